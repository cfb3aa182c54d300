"""What evaluation.json holds of a metric."""

import numpy as np
import pytest

from fusionlab.evaluate.results import Results


def test_a_metric_has_value_interval_count_and_chance():
  results = Results()
  hits = np.arange(100) < 40
  results.add("top1", hits, chance=1 / 32)
  results.add("nll", np.array([2.0, 6.0]), np.array([2, 2]))
  said = results.as_mapping()
  assert said["metrics"] == {"top1": pytest.approx(0.4), "nll": 2.0}
  low, high = said["intervals"]["top1"]
  # Two standard deviations of the mean are 0.098.
  assert 0.28 < low < 0.33 and 0.47 < high < 0.52
  assert said["counts"] == {"top1": 100, "nll": 2}
  assert said["chance"] == {"top1": 1 / 32}
