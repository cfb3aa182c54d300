"""Ranks of drawn pictures among a bank."""

import numpy as np

from fusionlab.evaluate.own_picture import features, ranks


def test_features_are_means_of_boxes():
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (3, 64, 64, 3), np.uint8)
  got = features(pictures).reshape(3, 16, 16, 3)
  expected = pictures[1, 8:12, 20:24].reshape(-1, 3).mean(0)
  np.testing.assert_allclose(got[1, 2, 5], expected, rtol=1e-5)
  small = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
  np.testing.assert_array_equal(features(small), small.reshape(2, -1))


def test_ranks_count_the_pictures_that_are_nearer():
  bank = np.stack(
    [np.full((16, 16, 3), v, np.uint8) for v in (0, 50, 100, 200)]
  )
  samples = np.stack([np.full((16, 16, 3), v, np.uint8) for v in (60, 60, 60)])
  got = ranks(samples, np.array([1, 2, 3]), bank)
  assert got.tolist() == [1, 2, 4]


def test_a_picture_is_its_own_nearest_and_twins_share_a_rank():
  rng = np.random.default_rng(0)
  bank = rng.integers(0, 256, (50, 32, 32, 3), np.uint8)
  bank[7] = bank[3]
  assert (ranks(bank, np.arange(50), bank) == 1).all()
