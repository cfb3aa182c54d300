"""The loader: batches by number, the same rows for any number of processes."""

import dataclasses

import numpy as np
import pytest

from fusionlab.data import documents as docs
from fusionlab.data.documents import Chances
from fusionlab.data.loader import Loader, Rows
from fusionlab.data.plan import Stream
from fusionlab.errors import UserError
from tests.data import fakes

CHANCES = Chances(image_first=0.5, caption_drop=0.2, first_caption=0.5)
ROWS = Rows(
  row_length=64, group_rows=2, batch_rows=8, counts=(88, 40), towers=(0, 1)
)


def _streams() -> list[Stream]:
  rng = np.random.default_rng(0)
  return [
    Stream("a", fakes.random_counts(90, rng), 1.0),
    Stream("b", fakes.text_counts(rng.integers(5, 200, 40)), 0.5),
  ]


def _loader(rows: Rows = ROWS, **options) -> Loader:
  streams = _streams()
  options = {
    "seed": 0, "chances": CHANCES, "lookahead": 64, "prefetch": 3, **options
  }  # fmt: skip
  return Loader(
    streams,
    [fakes.records_of(s.counts) for s in streams],
    fakes.VOCABULARY,
    rows,
    **options,
  )


def _arrays(batch):
  for field in dataclasses.fields(batch):
    value = getattr(batch, field.name)
    if isinstance(value, np.ndarray):
      yield field.name, value


@pytest.mark.smoke
def test_batch_against_a_slow_oracle():
  loader = _loader()
  batch = loader[2]
  rows, length = batch.tokens.shape
  assert (rows, length) == (8, 64)
  for r in range(rows):
    for i in range(length):
      segment = batch.segment[r, i]
      if segment == 0:
        for name, value in _arrays(batch):
          assert value[r, i] == 0, name
        continue
      members = np.flatnonzero(batch.segment[r] == segment)
      assert (np.diff(members) == 1).all()
      assert batch.position[r, i] == i - members[0]
      assert (batch.k_start[r, i], batch.k_end[r, i]) == (members[0], i + 1)
      token = batch.tokens[r, i]
      assert batch.modality[r, i] == (token >= fakes.TEXT_IDS)
      if i == members[-1]:
        assert (batch.target[r, i], batch.weight[r, i]) == (0, 0)
      else:
        assert batch.target[r, i] == batch.tokens[r, i + 1]
        assert batch.weight[r, i] == 1
  assert batch.weight.dtype == np.float32
  assert {v.dtype for n, v in _arrays(batch) if n != "weight"} == {
    np.dtype(np.int32)
  }


def test_an_epoch_holds_exactly_the_planned_documents():
  loader = _loader()
  streams = _streams()
  records = [fakes.records_of(s.counts) for s in streams]
  plan = loader.plan(0)
  expected = []
  for index, stream in enumerate(streams):
    here = np.flatnonzero(plan.source == index)
    draws = docs.draw(
      stream.counts,
      plan.document[here],
      plan.passes[here],
      seed=0,
      source=docs.stream_key(stream.name),
      chances=CHANCES,
    )
    parts = docs.offsets(stream.counts.parts[plan.document[here]])
    for n, piece in enumerate(here):
      ids = docs.document_ids(
        records[index][plan.document[piece]],
        fakes.VOCABULARY,
        reversed=bool(draws.reversed[n]),
        dropped=bool(draws.dropped[n]),
        alternative=draws.alternative[parts[n] : parts[n + 1]],
      )
      expected.append(tuple(ids[plan.start[piece] : plan.stop[piece]]))
  seen = []
  for step in range(loader.steps_in_epoch(0)):
    batch = loader[step]
    for row, segment in zip(batch.tokens, batch.segment, strict=True):
      seen += [tuple(row[segment == s]) for s in range(1, segment.max() + 1)]
  assert sorted(seen) == sorted(expected)


@pytest.mark.smoke
@pytest.mark.parametrize("processes", [2, 4])
def test_same_rows_for_any_number_of_processes(processes):
  whole = _loader()
  parts = [
    _loader(dataclasses.replace(ROWS, process_index=p, process_count=processes))
    for p in range(processes)
  ]
  for step in (0, 3, whole.steps_in_epoch(0) - 1, whole.steps_in_epoch(0)):
    batch = whole[step]
    shares = [part[step] for part in parts]
    for name, value in _arrays(batch):
      joined = np.concatenate([getattr(s, name) for s in shares])
      np.testing.assert_array_equal(joined, value)
    for tower in range(2):
      joined = np.concatenate([s.layout.take[tower] for s in shares])
      np.testing.assert_array_equal(joined, batch.layout.take[tower])
    assert whole.fill(step) == parts[0].fill(step)


def test_layout_is_a_permutation_that_holds_each_modality():
  loader = _loader()
  batch = loader[1]
  order = np.concatenate(batch.layout.take, axis=1)
  size = ROWS.group_rows * ROWS.row_length
  np.testing.assert_array_equal(
    np.sort(order, axis=1), np.tile(np.arange(size), (4, 1))
  )
  np.testing.assert_array_equal(
    np.take_along_axis(order, batch.layout.place, 1), np.sort(order, axis=1)
  )
  modality = batch.modality.reshape(4, size)
  real = (batch.segment > 0).reshape(4, size)
  for tower, take in enumerate(batch.layout.take):
    assert take.shape == (4, ROWS.counts[tower])
    here = np.take_along_axis(real, take, 1)
    assert (np.take_along_axis(modality, take, 1)[here] == tower).all()
  assert _loader(dataclasses.replace(ROWS, towers=None))[1].layout is None


def test_any_step_at_any_time_is_the_same_batch():
  loader, other = _loader(), _loader()
  steps = loader.steps_in_epoch(0) + loader.steps_in_epoch(1) + 2
  forward = [loader[s].tokens for s in range(steps)]
  for step in (steps - 1, 4, steps - 3, 0):
    np.testing.assert_array_equal(other[step].tokens, forward[step])
  assert not np.array_equal(forward[0], forward[loader.steps_in_epoch(0)]), (
    "epochs differ"
  )


def test_epochs_follow_one_another_without_a_batch_in_two():
  loader = _loader()
  ends = np.cumsum([loader.steps_in_epoch(e) for e in range(4)])
  for step in range(ends[-1]):
    assert loader.epoch_of(step) == np.searchsorted(ends, step, side="right")
  for epoch in range(4):
    groups = loader.plan(epoch).num_groups
    assert loader.steps_in_epoch(epoch) == -(-groups // 4)


def test_iterate_goes_on_from_any_step():
  loader = _loader()
  batches = loader.iterate(5)
  for step in range(5, 12):
    np.testing.assert_array_equal(next(batches).tokens, loader[step].tokens)
  np.testing.assert_array_equal(
    next(_loader(prefetch=0).iterate(6)).tokens, loader[6].tokens
  )


def test_fill_counts_real_tokens_over_places():
  loader = _loader()
  for step in (0, loader.steps_in_epoch(0) - 1):
    batch = loader[step]
    real = batch.segment > 0
    for m, name in enumerate(("text", "image")):
      tokens = (real & (batch.modality == m)).sum()
      assert loader.fill(step)[name] == tokens / (4 * ROWS.counts[m])


def test_one_pass_ends_after_every_document_once():
  loader = _loader(one_pass=True, chances=Chances())
  steps = list(loader.iterate())
  assert len(steps) == len(loader) == loader.steps_in_epoch(0)
  assert {s.tokens.shape for s in steps} == {(8, 64)}
  bos = sum(int((s.tokens == fakes.VOCABULARY.bos).sum()) for s in steps)
  assert bos == 90 + 40
  with pytest.raises(IndexError):
    loader[len(loader)]
  with pytest.raises(IndexError):
    _loader()[-1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"process_count": 3}, r"3 processes cannot share the 8 / 2 = 4 groups"),
    ({"group_rows": 3}, r"batch_size=8 rows is not a whole number of groups"),
  ],
)
def test_rows_that_do_not_divide_are_refused(options, message):
  with pytest.raises(UserError, match=message) as error:
    dataclasses.replace(ROWS, **options)
  assert "\n" not in str(error.value)
