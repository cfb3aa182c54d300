"""What a caller of generation can choose; imports nothing slow."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fusionlab.config import option

MAX_NEW_TOKENS = 256
# Fields of `Sampling` that say how continuous pictures are drawn, and no more.
DIFFUSION = ("diffusion_steps", "sampler", "eta", "clip_latents")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next id, or a continuous picture, is drawn.

  The defaults are for small models of pictures.
  """

  temperature: float = option(
    0.3, "divides the logits; 0 takes the likeliest id", minimum=0.0
  )
  top_k: int = option(16, "ids kept, the likeliest; 0: all", minimum=0)
  top_p: float = option(
    1.0,
    "probability that the kept ids reach together (nucleus); 1: all",
    minimum=0.0,
    maximum=1.0,
  )
  min_p: float = option(
    0.0,
    "ids less likely than this times the likeliest are cut",
    minimum=0.0,
    maximum=1.0,
  )
  repetition_penalty: float = option(
    1.0, "makes ids of text that occurred less likely; 1: off", minimum=1.0
  )
  guidance: float = option(
    1.0,
    "classifier-free guidance of pictures, w of u + w (c - u); 1: none",
    minimum=0.0,
  )
  diffusion_steps: int = option(
    50, "steps in which a continuous picture is drawn", minimum=1
  )
  sampler: str = option(
    "",
    "of those steps: ddpm, ddim, or euler for rectified flow; '': the process's"
    " first",
  )
  eta: float = option(
    0.0,
    "noise that a step of ddim adds, from none to as much as ddpm's",
    minimum=0.0,
    maximum=1.0,
  )
  clip_latents: float = option(
    5.0,
    "largest |x0| of what a step takes the picture for, in standard deviations of"
    " the latents; 0: no bound",
    minimum=0.0,
  )

  @property
  def guided(self) -> bool:
    """Whether rows without their caption are run beside the others."""
    return self.guidance != 1.0


@dataclasses.dataclass(frozen=True)
class Request:
  """What a command line asks for.

  Attributes:
    prompts: texts; with `images`, each stands behind its picture.
    images: files; one for each prompt, one for all, or alone.
    out: folder for the results; "" makes a new one in the run's folder.
    settings: arguments of `generate` besides the model and the prompts.
  """

  prompts: tuple[str, ...] = ()
  images: tuple[str, ...] = ()
  out: str = ""
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
