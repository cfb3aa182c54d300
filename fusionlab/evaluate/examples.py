"""Each captioned picture's own loss: means with intervals, extremes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusionlab.evaluate.bootstrap import Interval, interval
from fusionlab.evaluate.captioned import Captioned, picture_after_caption
from fusionlab.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True)
class ExampleScore:
  """How well one picture is predicted after its caption.

  Attributes:
    source, index, key: where it stands, see `Captioned`.
    caption: its text.
    loss: -log p(codes | caption), nats, summed over the codes; of a continuous
      picture the denoising errors, summed over the patches.
    positions: how many codes or patches.
  """

  source: str
  index: int
  key: str
  caption: str
  loss: float
  positions: int

  @property
  def mean_loss(self) -> float:
    """Nats per code, or the mean square error of the predicted noise."""
    return self.loss / self.positions


def example_scores(
  scorer: Any, examples: Sequence[Captioned], text: TextTokenizer
) -> list[ExampleScore]:
  """Scores each picture after its caption, `<bos> caption <boi> picture`.

  Args:
    scorer: a `fusionlab.evaluate.likelihood.Scorer`.
    examples: see `captioned_examples`.
    text: decodes the captions.

  Returns:
    One entry an example, in their order. Sort them by `mean_loss` for the
    likeliest and the least likely.
  """
  documents = [picture_after_caption(e, e, scorer.vocabulary) for e in examples]
  values = scorer.log_probabilities(
    [d.ids for d in documents],
    [d.span for d in documents],
    latents=[d.latents for d in documents],
  )
  return [
    ExampleScore(
      source=e.source,
      index=e.index,
      key=e.key,
      caption=text.decode(e.caption),
      loss=-float(v.sum(dtype=np.float64)),
      positions=len(e.codes),
    )
    for e, v in zip(examples, values, strict=True)
  ]


def mean_loss(scores: Sequence[ExampleScore], *, seed: int = 0) -> Interval:
  """Mean over all codes or patches, with a 95% bootstrap interval.

  Args:
    scores: at least one.
    seed: of the bootstrap.

  Raises:
    UserError: no scores.
  """
  return interval(
    np.array([s.loss for s in scores]),
    np.array([s.positions for s in scores]),
    seed=seed,
  )
