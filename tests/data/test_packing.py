"""Packing: what fits best is found, and nothing is lost."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fusionlab.data.packing import pack


@pytest.mark.smoke
def test_texts_of_many_lengths_fill_every_row():
  text = np.random.default_rng(0).integers(20, 80, 2000)
  lengths = np.stack([text, 0 * text], 1)
  rows, groups = pack(
    lengths, counts=(800, 0), row_length=100, group_rows=8, lookahead=500
  )
  filled = np.bincount(rows, text, groups * 8)
  assert filled.max() == 100
  # The window runs empty at the end; before it, what fits exactly is found.
  assert filled[: groups * 6].mean() > 99.5


def test_pictures_alone_fill_their_places():
  rng = np.random.default_rng(0)
  lengths = np.stack([rng.integers(10, 40, 2000), np.full(2000, 64)], 1)
  mean = lengths.mean(0)
  image = round(4096 * mean[1] / mean.sum() / 64) * 64
  counts = (4096 - image, image)
  _, groups = pack(
    lengths, counts=counts, row_length=512, group_rows=8, lookahead=512
  )
  assert (lengths.sum(0) / (np.array(counts) * groups)).min() > 0.93


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_every_piece_gets_a_row_within_rows_and_places(data):
  rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
  modalities = data.draw(st.integers(2, 3))
  number = data.draw(st.integers(1, 60))
  lengths = rng.integers(0, 9, (number, modalities))
  lengths[:, 0] += 1
  lengths[rng.random(number) < 0.5, 1:] = 0
  counts = tuple(int(c) for c in rng.integers(9, 40, modalities))
  group_rows = data.draw(st.sampled_from([1, 3]))
  rows, groups = pack(
    lengths,
    counts=counts,
    row_length=32,
    group_rows=group_rows,
    lookahead=data.draw(st.sampled_from([1, 5, 100])),
  )
  assert rows.min() >= 0
  assert rows.max() < groups * group_rows
  assert np.bincount(rows, lengths.sum(1)).max() <= 32
  used = np.zeros((groups, modalities), int)
  np.add.at(used, rows // group_rows, lengths)
  assert (used <= np.array(counts)).all()
  assert used.any(axis=1).all()


def test_no_pieces_make_no_groups():
  rows, groups = pack(
    np.zeros((0, 2), np.int64),
    counts=(8, 8),
    row_length=8,
    group_rows=2,
    lookahead=4,
  )
  assert (len(rows), groups) == (0, 0)
