"""Each captioned picture's own likelihood: means with intervals, extremes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusionlab.evaluate.bootstrap import Interval, interval
from fusionlab.evaluate.captioned import Captioned, picture_after_caption
from fusionlab.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True)
class ExampleScore:
  """How likely one picture is after its caption.

  Attributes:
    source, index, key: where it stands, see `Captioned`.
    caption: its text.
    nll: -log p(codes | caption), nats, summed over the codes.
    codes: how many.
  """

  source: str
  index: int
  key: str
  caption: str
  nll: float
  codes: int

  @property
  def nll_per_code(self) -> float:
    """Nats per code."""
    return self.nll / self.codes


def example_scores(
  scorer: Any, examples: Sequence[Captioned], text: TextTokenizer
) -> list[ExampleScore]:
  """Scores each picture's codes after its caption, `<bos> caption <boi> codes`.

  Args:
    scorer: a `fusionlab.evaluate.likelihood.Scorer`.
    examples: see `captioned_examples`.
    text: decodes the captions.

  Returns:
    One entry an example, in their order. Sort them by `nll_per_code` for the
    likeliest and the least likely.
  """
  documents = [picture_after_caption(e, e, scorer.vocabulary) for e in examples]
  values = scorer.log_probabilities(
    [d.ids for d in documents], [d.span for d in documents]
  )
  return [
    ExampleScore(
      source=e.source,
      index=e.index,
      key=e.key,
      caption=text.decode(e.caption),
      nll=-float(v.sum(dtype=np.float64)),
      codes=len(e.codes),
    )
    for e, v in zip(examples, values, strict=True)
  ]


def nll_per_code(scores: Sequence[ExampleScore], *, seed: int = 0) -> Interval:
  """Mean nats per code over all codes, with a 95% bootstrap interval.

  Args:
    scores: at least one.
    seed: of the bootstrap.

  Raises:
    UserError: no scores.
  """
  return interval(
    np.array([s.nll for s in scores]),
    np.array([s.codes for s in scores]),
    seed=seed,
  )
