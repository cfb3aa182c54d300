"""Numbers of an evaluation with their intervals, counts and chance."""

import dataclasses
from typing import Any

import numpy as np

from fusionlab.evaluate.bootstrap import interval

RESAMPLES = 2000


@dataclasses.dataclass
class Results:
  """What `evaluation.json` holds, by metric.

  Attributes:
    seed: of the bootstrap.
    metrics: values.
    intervals: low and high end, 95%, where there are examples.
    counts: examples behind a value.
    chance: what guessing would give, for retrieval.
  """

  seed: int = 0
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  intervals: dict[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  chance: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(
    self,
    name: str,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    chance: float | None = None,
  ) -> None:
    """Adds sum(values) / sum(weights) over examples.

    Args:
      name: of the metric.
      values: one an example.
      weights: one an example; None makes it their mean.
      chance: what guessing would give.
    """
    found = interval(values, weights, seed=self.seed, resamples=RESAMPLES)
    self.metrics[name] = found.value
    self.intervals[name] = found.low, found.high
    self.counts[name] = len(values)
    if chance is not None:
      self.chance[name] = chance

  def as_mapping(self) -> dict[str, Any]:
    """Returns the fields as JSON takes them."""
    return {
      **dataclasses.asdict(self),
      "resamples": RESAMPLES,
    }
