"""Draws pictures for captions and captions for pictures, and ranks them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from fusionlab.data.sources import load_source
from fusionlab.data.sources.pictures import square
from fusionlab.evaluate.captioned import Captioned
from fusionlab.evaluate.own_picture import ranks
from fusionlab.evaluate.results import Results
from fusionlab.experiment import Experiment
from fusionlab.generation.denoising import snapshot_steps
from fusionlab.generation.generate import Generated, generate
from fusionlab.generation.prompts import Encoded
from fusionlab.tokenizers import LatentTokenizer, Tokenizers

_CAPTION_TOKENS = 32
_SNAPSHOTS = 6  # of a picture on its way, at most


class Gallery:
  """What a model draws and writes for some examples, as files and numbers."""

  def __init__(
    self,
    model: Any,
    params: Any,
    tokenizers: Tokenizers,
    experiment: Experiment,
    bank: Sequence[Captioned],
  ):
    """Prepares to draw.

    Args:
      model: has `step`, see `fusionlab.generation.sampler`.
      params: its parameters.
      tokenizers: its tokenizers.
      experiment: of the run: how much is drawn and how, and the sources, which
        have the real pictures.
      bank: pictures among which a drawn one is looked for.
    """
    self._model, self._params = model, params
    self.tokenizers, self.config = tokenizers, experiment.evaluate
    self._image = tokenizers.pictures("a gallery")
    self._sources = experiment.data.sources
    self._place = {(e.source, e.key): i for i, e in enumerate(bank)}
    self._bank = self.reconstructed(bank)
    config = self.config
    self.settings: dict[str, Any] = {
      "temperature": config.temperature,
      "top_k": config.top_k,
      "guidance": config.guidance,
      "seed": config.seed,
    }
    if self.continuous:
      self.settings["diffusion_steps"] = config.diffusion_steps
      if config.sampler:
        self.settings["sampler"] = config.sampler

  @property
  def continuous(self) -> bool:
    """Whether pictures are latents, not codes."""
    return isinstance(self._image, LatentTokenizer)

  @property
  def loss_name(self) -> str:
    """What `ExampleScore.mean_loss` is."""
    return "denoising_mse" if self.continuous else "nll_per_code"

  @property
  def snapshot_steps(self) -> list[int]:
    """Denoising steps at which `draw` keeps snapshots, from 0; none of codes."""
    steps = self.config.diffusion_steps
    # What the last step takes a picture for is the picture.
    number = min(_SNAPSHOTS, max(steps - 2, 0)) if self.continuous else 0
    return snapshot_steps(number, steps)

  @property
  def bank_size(self) -> int:
    """Pictures in the bank."""
    return len(self._bank)

  def codes(self, example: Captioned) -> Int[np.ndarray, " C"]:
    """Codes of an example's picture, as the image tokenizer counts them."""
    offset = self.tokenizers.vocabulary.offset(example.modality)
    return example.codes - offset

  def reconstructed(
    self, examples: Sequence[Captioned]
  ) -> UInt8[np.ndarray, "n S S 3"]:
    """What the tokenizer makes of the examples' own codes or latents."""
    kept = [e.latents if self.continuous else self.codes(e) for e in examples]
    return self._image.decode(np.stack(kept))

  def draw(
    self,
    examples: Sequence[Captioned],
    num_samples: int = 1,
    *,
    snapshots: bool = False,
  ) -> list[Generated]:
    """Pictures for the captions: `num_samples` of the first, then the second.

    Args:
      examples: whose captions are read.
      num_samples: of each.
      snapshots: whether pictures keep what they were at `snapshot_steps`.
    """
    bos = self.tokenizers.vocabulary.bos
    return generate(
      self._model,
      self._params,
      self.tokenizers,
      [[bos, *e.caption.tolist()] for e in examples],
      make="image",
      num_samples=num_samples,
      snapshots=len(self.snapshot_steps) if snapshots else 0,
      **self.settings,
    )

  def describe(
    self, examples: Sequence[Captioned], num_samples: int = 2
  ) -> list[Generated]:
    """Captions for the examples' pictures."""
    vocabulary = self.tokenizers.vocabulary
    settings: dict[str, Any] = {**self.settings, "guidance": 1.0}
    return generate(
      self._model,
      self._params,
      self.tokenizers,
      [
        Encoded(
          [
            vocabulary.bos,
            vocabulary.begin[e.modality],
            *e.codes.tolist(),
            vocabulary.end[e.modality],
          ],
          e.latents if self.continuous else None,
        )
        for e in examples
      ],
      make="text",
      max_new_tokens=_CAPTION_TOKENS,
      num_samples=num_samples,
      **settings,
    )

  def ranks(
    self, examples: Sequence[Captioned], drawn: Sequence[Generated]
  ) -> Int[np.ndarray, " n"]:
    """Rank in the bank of each drawn picture's own one, see `own_picture`."""
    own = [examples[d.prompt] for d in drawn]
    places = np.array([self._place[e.source, e.key] for e in own])
    return ranks(np.stack([d.pictures[0] for d in drawn]), places, self._bank)

  def measure(
    self, split: str, examples: Sequence[Captioned], results: Results
  ) -> None:
    """Own-picture retrieval, and agreement of codes, of one sample an example.

    Args:
      split: for the metrics' names.
      examples: whose captions are drawn; all in the bank.
      results: gets `eval/<split>/own_picture/top1`, ….
    """
    drawn = self.draw(examples)
    rank = self.ranks(examples, drawn)
    name = f"eval/{split}/own_picture"
    for top in (1, 5, 20):
      chance = min(top / len(self._bank), 1.0)
      results.add(f"{name}/top{top}", rank <= top, chance=chance)
    results.metrics[f"{name}/median_rank"] = float(np.median(rank))
    results.counts[f"{name}/median_rank"] = len(rank)
    if self.continuous:
      return
    agreement = [
      np.mean(np.array(d.ids[-1 - len(e.codes) : -1]) == e.codes)
      for d, e in zip(drawn, examples, strict=True)
    ]
    results.add(f"{name}/code_agreement", np.array(agreement))

  def originals(
    self, examples: Sequence[Captioned]
  ) -> dict[tuple[str, str], np.ndarray]:
    """The examples' real pictures, by (source, key), where the sources give them.

    Reads each source until all are found: they keep no index.
    """
    size = self._image.image_size
    found = {}
    for name, source in self._sources.items():
      wanted = {e.key for e in examples if e.source == name}
      if not wanted:
        continue
      for example in load_source(name, source).examples():
        if example.key in wanted:
          found[name, example.key] = square(
            np.asarray(example.parts[-1].alternatives[0]), size
          )
          wanted.remove(example.key)
          if not wanted:
            break
    return found
