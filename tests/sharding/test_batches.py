"""Rows meet devices: shares of processes, rows dealt to context-parallel ones."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError
from fusionlab.sharding import batches, rules
from fusionlab.sharding.mesh import AXES, MeshConfig, make_mesh
from fusionlab.testing.batches import random_batch

VOCABULARY = Vocabulary(("text", "image"), (48, 16))


def batch_of(towers=(0, 1), group_rows=1):
  return random_batch(
    np.random.default_rng(0), VOCABULARY, rows=8, length=32, towers=towers,
    group_rows=group_rows, padding=16, documents=2,
  )  # fmt: skip


@pytest.mark.parametrize("towers", [(0, 1), (0, 0)])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_dealt_rows_are_the_same_rows(towers, parts):
  """`stored` leads back; every device has its share of each tower's places."""
  batch = batch_of(towers)
  split = batches.split_rows(batch, parts)
  for field in dataclasses.fields(batch):
    before = getattr(batch, field.name)
    if field.name in ("layout", "stored") or before is None:
      continue
    after = np.take_along_axis(getattr(split, field.name), split.stored, 1)
    np.testing.assert_array_equal(after, before)
  if batch.layout is None:
    assert split.layout is None
    return
  size = 32 // parts
  order = np.argsort(split.stored, axis=1)
  for before, after in zip(batch.layout.take, split.layout.take, strict=True):
    device = np.repeat(np.arange(parts), before.shape[1] // parts)
    np.testing.assert_array_equal(after // size, np.tile(device, (8, 1)))
    # The same positions of the sequence, in another order.
    positions = np.take_along_axis(order, after, axis=1)
    np.testing.assert_array_equal(np.sort(positions), np.sort(before))
  places = np.concatenate(split.layout.take, axis=1)
  np.testing.assert_array_equal(
    np.take_along_axis(places, split.layout.place, 1),
    np.tile(np.arange(32), (8, 1)),
  )


def test_causal_work_is_shared_out_evenly():
  """Keys seen by the queries of each device differ by less than a tenth."""
  rows = np.random.default_rng(0)
  batch = random_batch(rows, VOCABULARY, rows=4, length=256, towers=(0, 1), group_rows=1)  # fmt: skip
  split = batches.split_rows(batch, 4)
  seen = (split.k_end - split.k_start).reshape(4, 4, 64).sum(-1)
  assert seen.max() < 1.1 * seen.min()


@pytest.mark.parametrize(
  ("group_rows", "counts", "parts", "message"),
  [
    (2, (32, 32), 4, r"config\.data\.group_rows=1"),
    (1, (30, 2), 4, r"30 \+ 2; choose config\.data\.row_length"),
  ],
)
def test_rows_that_cannot_be_dealt_are_refused(
  group_rows, counts, parts, message
):
  """Groups of several rows, and counts that do not divide."""
  with pytest.raises(UserError, match=message):
    batches.check_split(group_rows, counts, parts)
  batches.check_split(group_rows, counts, 1)


def test_rows_that_do_not_split_are_refused(monkeypatch):
  """The message says which key to change; hosts read whole groups."""
  mesh = make_mesh(MeshConfig(data=8))
  batch = batch_of(group_rows=8)
  whole = batches.batch_shardings(batch, mesh).layout.place
  assert whole.is_fully_replicated
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"config\.data\.group_rows"):
    batches.batch_shardings(batch, mesh)
  with pytest.raises(UserError, match="multiple of 8"):
    batches.batch_shardings(batch.replace(tokens=batch.tokens[:6]), mesh)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """A device of a process."""

  id: int
  process_index: int


def mesh_of(processes, **sizes):
  """A mesh of eight devices, some to each process, in order."""
  grid = [FakeDevice(i, i * processes // 8) for i in range(8)]
  shape = [sizes.get(axis, 1) for axis in AXES]
  return Mesh(np.asarray(grid, object).reshape(shape), AXES)


@pytest.mark.parametrize(
  ("processes", "sizes", "shares"),
  [
    (1, {"data": 8}, [(0, 1)]),
    (2, {"data": 2, "fsdp": 4}, [(0, 2), (1, 2)]),
    (4, {"fsdp": 4, "tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    # The devices of two processes hold the same rows.
    (4, {"fsdp": 2, "sequence": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (2, {"tensor": 8}, [(0, 1), (0, 1)]),
  ],
)
def test_processes_read_the_rows_of_their_devices(
  monkeypatch, processes, sizes, shares
):
  """Equal shares, the same one where tensor or sequence spans processes."""
  mesh = mesh_of(processes, **sizes)
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    assert batches.process_share(mesh) == share


def test_shares_that_overlap_are_refused():
  """Three devices to a process and two to a data shard."""
  grid = [FakeDevice(i, i // 3) for i in range(6)]
  shape = [{"data": 3, "tensor": 2}.get(axis, 1) for axis in AXES]
  mesh = Mesh(np.asarray(grid, object).reshape(shape), AXES)
  with pytest.raises(UserError, match="lie across 2 processes"):
    batches.process_share(mesh)


def test_data_shards_count_the_axes_that_split_the_batch():
  """Tensor and sequence do not."""
  mesh = make_mesh(MeshConfig(data=2, expert=2, sequence=2))
  assert rules.data_shards(mesh) == 4
  assert rules.sequence_shards(mesh) == 2
