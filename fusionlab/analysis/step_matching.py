"""Step matching: how many steps a model needs for what the control reached.

Source: Mixture-of-Transformers (arXiv 2411.04996), §3.1: s = steps to the dense
model's loss / the dense model's steps. At equal FLOPs a step, s is the fraction of
the training FLOPs too.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Curve:
  """A loss over optimizer steps.

  Attributes:
    steps: ascending.
    losses: of the same length, finite.
  """

  steps: Int[np.ndarray, " n"]
  losses: Float[np.ndarray, " n"]

  @property
  def best(self) -> Float[np.ndarray, " n"]:
    """Least loss up to each step: what an early stop would have kept."""
    return np.minimum.accumulate(self.losses)


def steps_to(curve: Curve, loss: float) -> float:
  """Steps until a curve first reaches a loss, linear between its points.

  Args:
    curve: its least loss so far counts, so a spike loses nothing.
    loss: what is to be reached.

  Returns:
    Optimizer steps; nan where the curve ends above the loss, and the first
    point's step where it begins below.
  """
  best = curve.best
  reached = np.flatnonzero(best <= loss)
  if not len(reached):
    return math.nan
  i = int(reached[0])
  if i == 0:
    return float(curve.steps[0])
  above, below = best[i - 1], best[i]
  share = (above - loss) / (above - below)
  return float(
    curve.steps[i - 1] + share * (curve.steps[i] - curve.steps[i - 1])
  )


def step_ratios(control: Curve, other: Curve) -> Curve:
  """Finds s at every point of the control: the other's steps over the control's.

  Args:
    control: its least loss up to each step is what the other has to reach.
    other: the model that is compared, with data of the same seed.

  Returns:
    The control's steps and s; points that the other never reaches, and a step 0,
    are left out.
  """
  ratios = [
    steps_to(other, loss) / step if step else math.nan
    for step, loss in zip(control.steps, control.best, strict=True)
  ]
  known = np.isfinite(ratios)
  return Curve(control.steps[known], np.asarray(ratios)[known])


def final_step_ratio(control: Curve, other: Curve) -> float:
  """Finds s at the control's end; inf where the other never gets there.

  Args:
    control: its least loss is what the other has to reach, its last step what
      the other's steps are divided by.
    other: the model that is compared, with data of the same seed.
  """
  steps = steps_to(other, float(control.best[-1]))
  return math.inf if math.isnan(steps) else steps / float(control.steps[-1])


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
  """Mean, least and greatest; a mean with inf in it is inf."""
  return float(np.mean(values)), min(values), max(values)
