"""Bootstrap intervals with answers that are known."""

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.evaluate.bootstrap import interval


@pytest.mark.smoke
def test_a_proportion_has_the_binomial_interval():
  """Half of 400 hits: 0.5 ± 1.96 · 0.5 / √400."""
  hits = np.arange(400) % 2 == 0
  found = interval(hits, resamples=5000)
  assert found.value == 0.5
  np.testing.assert_allclose(found[1:], [0.451, 0.549], atol=0.006)


def test_two_examples_reach_from_one_to_the_other():
  """Of two draws out of {0, 1} a quarter are both 0 and a quarter both 1."""
  assert interval(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)
  found = interval(np.array([0.0, 1.0]), level=0.4)
  assert found[1:] == (0.5, 0.5)


def test_equal_ratios_have_no_width():
  """Twice the nats with twice the codes: numerator and denominator go together."""
  codes = np.arange(1, 30)
  found = interval(2.5 * codes, codes)
  np.testing.assert_allclose(found, [2.5, 2.5, 2.5], rtol=1e-12)


def test_ratio_of_sums_is_no_mean_of_ratios():
  assert interval(np.array([1.0, 9.0]), np.array([1, 3])).value == 2.5


def test_the_seed_decides():
  values = np.random.default_rng(0).normal(size=50)
  assert interval(values, seed=1) == interval(values, seed=1)
  assert interval(values, seed=1) != interval(values, seed=2)


def test_one_example_is_its_own_interval():
  assert interval(np.array([3.0]), np.array([2])) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
  ("numerators", "denominators", "message"),
  [
    (np.zeros(0), None, "0 numerators and 0 denominators"),
    (np.zeros(3), np.ones(2), "3 numerators and 2 denominators"),
    (np.zeros(2), np.zeros(2), "denominators above 0"),
  ],
)
def test_mistakes_are_named(numerators, denominators, message):
  with pytest.raises(UserError, match=message):
    interval(numerators, denominators)
