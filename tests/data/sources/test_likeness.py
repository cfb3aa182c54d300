"""Which pictures count as the same."""

import numpy as np
import pytest

from fusionlab.data.sources.likeness import Seen, same_lines, thumb


@pytest.mark.smoke
def test_a_repetition_is_told_from_a_new_picture():
  draw = np.random.default_rng(0)
  pictures = draw.integers(0, 256, (600, 64, 64, 3)).astype(np.uint8)
  seen = Seen()
  assert all(seen.add(p) for p in pictures)
  assert not any(seen.add(p) for p in pictures)


@pytest.mark.smoke
def test_a_small_noise_is_no_new_picture_but_a_patch_is():
  draw = np.random.default_rng(0)
  picture = draw.integers(0, 250, (64, 64, 3)).astype(np.uint8)
  noisy = picture + draw.integers(0, 4, picture.shape).astype(np.uint8)
  patched = picture.copy()
  patched[:8, :8] = 0
  seen = Seen()
  assert seen.add(picture)
  assert not seen.add(noisy)
  assert seen.add(patched)


@pytest.mark.smoke
def test_distance_is_the_root_mean_square():
  black = np.zeros((64, 64, 3), np.uint8)
  grey = np.full_like(black, 51)
  apart = np.linalg.norm(thumb(black) - thumb(grey))
  assert apart == pytest.approx(0.2, rel=1e-5)
  assert same_lines(black, np.full_like(black, 6))
  assert not same_lines(black, np.full_like(black, 7))
