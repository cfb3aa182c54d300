"""Intervals of means and ratios over examples, by SciPy's bootstrap."""

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Num

from fusionlab.errors import UserError


class Interval(NamedTuple):
  """An estimate and its interval: `value`, from `low` to `high`."""

  value: float
  low: float
  high: float


def interval(
  numerators: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"],
  denominators: Num[np.ndarray, " m"] | None = None,
  *,
  seed: int = 0,
  resamples: int = 2000,
  level: float = 0.95,
) -> Interval:
  """Percentile bootstrap of sum(numerators) / sum(denominators) over examples.

  Examples are drawn with replacement, numerator and denominator together
  (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, §13.3). The
  interval speaks of the examples' variation, not of the training's.

  Args:
    numerators: one an example: hits, or a sum of nats.
    denominators: one an example (tokens); None counts examples, which makes it
      the mean.
    seed: of the resamples.
    resamples: how many.
    level: probability inside the interval.

  Returns:
    Value and ends; of a single example all three are its own.

  Raises:
    UserError: no example, lengths that differ, or denominators that are not
      positive.
  """
  top = np.asarray(numerators, np.float64)
  below = np.ones_like(top)
  if denominators is not None:
    below = np.asarray(denominators, np.float64)
  if not len(top) or top.shape != below.shape or below.min() <= 0:
    raise UserError(
      f"interval got {len(top)} numerators and {len(below)} denominators, the"
      f" least {min(below, default=0)}; give as many of both, at least one, and"
      f" denominators above 0"
    )
  value = float(top.sum() / below.sum())
  if len(top) == 1:
    return Interval(value, value, value)
  found = scipy.stats.bootstrap(
    (top, below),
    lambda x, y, axis: x.sum(axis) / y.sum(axis),
    paired=True,
    vectorized=True,
    method="percentile",
    n_resamples=resamples,
    # Resamples held at one time: 2**22 numbers of each array.
    batch=max(1, 2**22 // len(top)),
    confidence_level=level,
    rng=np.random.default_rng(seed),
  )
  ends = found.confidence_interval
  return Interval(value, float(ends.low), float(ends.high))
