"""Steps to equal loss."""

import math

import numpy as np
import pytest

from fusionlab.analysis.step_matching import (
  Curve,
  final_step_ratio,
  mean_and_range,
  step_ratios,
  steps_to,
)


def curve(losses, every=10):
  steps = np.arange(1, len(losses) + 1) * every
  return Curve(steps, np.asarray(losses, float))


def test_steps_are_linear_between_points():
  assert steps_to(curve([4.0, 2.0]), 3.0) == 15
  assert steps_to(curve([4.0, 2.0]), 2.0) == 20
  assert steps_to(curve([4.0, 2.0]), 5.0) == 10


def test_a_spike_loses_nothing():
  assert steps_to(curve([4.0, 2.0, 9.0, 1.0]), 1.5) == 35


def test_what_is_never_reached():
  assert math.isnan(steps_to(curve([4.0, 2.0]), 1.0))
  assert math.isinf(final_step_ratio(curve([4.0, 1.0]), curve([4.0, 2.0])))
  assert mean_and_range([0.5, math.inf])[0] == math.inf


def test_a_model_needs_its_own_steps_and_a_faster_one_half():
  control = curve([4.0, 3.0, 2.0, 1.0])
  assert final_step_ratio(control, control) == 1
  assert final_step_ratio(control, curve([3.0, 1.0, 0.5, 0.4])) == 0.5


def test_ratios_along_the_control():
  ratios = step_ratios(curve([4.0, 3.0, 1.0]), curve([4.0, 2.0, 1.5]))
  np.testing.assert_array_equal(ratios.steps, [10, 20])
  np.testing.assert_allclose(ratios.losses, [1.0, 0.75])


def test_the_mean_has_its_range():
  assert mean_and_range([1.0, 3.0]) == pytest.approx((2.0, 1.0, 3.0))
