"""`config.evaluate`: what is measured and drawn of a trained model."""

import dataclasses

from fusionlab.config import option


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Scores and samples of captioned pictures, after training and by mode.

  Any of it may change on resume.
  """

  after_training: bool = option(
    True, "score, draw and write the report when a run has finished"
  )
  examples: int = option(
    256,
    "captioned pictures of each split that are scored; 0: none",
    minimum=0,
  )
  drawn: int = option(
    256,
    "of these, how many are drawn, to be looked for among real ones",
    minimum=0,
  )
  matched: int = option(
    64,
    "of these, how many are matched with their captions by likelihood, in"
    " groups of 32",
    minimum=0,
  )
  bank: int = option(
    4096,
    "pictures of each split at most among which a drawn one is looked for",
    minimum=1,
  )
  grid: int = option(12, "rows of a grid in the report", minimum=0)
  num_samples: int = option(4, "pictures drawn for a row of a grid", minimum=1)
  temperature: float = option(0.3, "of all samples", minimum=0.0)
  top_k: int = option(16, "of all samples; 0: all ids", minimum=0)
  guidance: float = option(
    1.0, "classifier-free guidance of drawn pictures", minimum=0.0
  )
  diffusion_steps: int = option(
    25, "steps in which a continuous picture is drawn", minimum=1
  )
  sampler: str = option(
    "", "of continuous pictures; '': the first of the model's process"
  )
  seed: int = option(
    0, "of the choice of examples, the samples and the bootstrap", minimum=0
  )
