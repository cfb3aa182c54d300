"""Names of metrics, and what is computed from the step's sums and the clock."""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

Row = dict[str, float]


def is_mean(value: Any) -> bool:
  """True for a `fusionlab.objectives.metrics.Mean`, by its two fields."""
  return hasattr(value, "total") and hasattr(value, "count")


def add_sums(
  sums: dict[str, np.ndarray], means: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Adds fetched Means to running sums, in float64 on the host.

  Args:
    sums: metric -> [total, count]; changed in place.
    means: metric -> Mean of host arrays.

  Returns:
    `sums`.
  """
  for name, mean in means.items():
    pair = np.array([mean.total, mean.count], np.float64)
    sums[name] = sums.get(name, np.zeros(2)) + pair
  return sums


def averages(sums: Mapping[str, np.ndarray], prefix: str) -> Row:
  """Divides sums by counts; a metric without a count is left out.

  Args:
    sums: see `add_sums`.
    prefix: 'train/', 'eval/' or 'eval/<split>/'.
  """
  return {
    f"{prefix}{name}": float(total / count)
    for name, (total, count) in sums.items()
    if count and not name.startswith("tokens/")
  }


def train_row(fetched: Mapping[str, Any]) -> Row:
  """Turns the fetched metrics of one step into a row.

  Args:
    fetched: host copies of what `train_step` returns.

  Returns:
    `train/loss`, `train/loss/text`, …, `train/grad_norm`; a modality that the
    batch lacks has no entry.
  """
  means = {k: v for k, v in fetched.items() if is_mean(v)}
  row = averages(add_sums({}, means), "train/")
  row["train/grad_norm"] = float(fetched["grad_norm"])
  if "learning_rate" in fetched:
    row["train/learning_rate"] = float(fetched["learning_rate"])
  if int(fetched["skipped"]):
    row["train/skipped_steps"] = float(fetched["skipped"])
  return row


class Throughput:
  """Speed between two rows of metrics, without evaluations and saves.

  Attributes:
    step_s: seconds per step of the last interval; nan before the first.
    tokens_per_s: real tokens per second of the last interval.
  """

  def __init__(self, flops_per_token: float, peak_flops: float | None):
    """Starts the clock.

    Args:
      flops_per_token: training FLOPs of one token by the model's own formula.
      peak_flops: of all devices together; None where it is not known (no MFU).
    """
    self.flops_per_token = flops_per_token
    self.peak_flops = peak_flops
    self.step_s = math.nan
    self.tokens_per_s = math.nan
    self.restart()

  def restart(self) -> None:
    """Forgets the interval; called before the first step it is to hold."""
    self._start = time.monotonic()
    self._paused = self._waited = 0.0
    self._tokens = self._steps = 0

  def add(self, tokens: int) -> None:
    """Counts one finished step and its real tokens."""
    self._tokens += tokens
    self._steps += 1

  def waited(self, seconds: float) -> None:
    """Counts seconds in which the loop waited for a batch."""
    self._waited += seconds

  def paused(self, seconds: float) -> None:
    """Takes out seconds spent on an evaluation, a save or a compilation."""
    self._paused += seconds

  def row(self) -> Row:
    """Ends the interval.

    Returns:
      `perf/step_s`, `perf/tokens_per_s` (real tokens), `perf/data_wait`
      (fraction of the time), `perf/model_flops_per_s` (causal attention
      halved, no remat, no padding) and, where the peak is known, `perf/mfu`.
      Empty where the interval has no whole step.
    """
    seconds = time.monotonic() - self._start - self._paused
    steps, tokens, waited = self._steps, self._tokens, self._waited
    self.restart()
    if not steps or seconds <= 0:
      return {}
    self.step_s = seconds / steps
    self.tokens_per_s = tokens / seconds
    flops = self.flops_per_token * self.tokens_per_s
    row = {
      "perf/step_s": self.step_s,
      "perf/tokens_per_s": self.tokens_per_s,
      "perf/data_wait": min(waited / seconds, 1.0),
      "perf/model_flops_per_s": flops,
    }
    if self.peak_flops:
      row["perf/mfu"] = flops / self.peak_flops
    return row
