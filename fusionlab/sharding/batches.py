"""How rows meet devices: batches placed, shared by processes, split in length."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from fusionlab.batch import Batch
from fusionlab.errors import UserError
from fusionlab.routing import Layout
from fusionlab.sharding import axes, rules
from fusionlab.sharding.mesh import AXES


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
  """Sharding of every array of a batch: rows and groups over the data axes.

  Rows that were split for context parallelism (`Batch.stored`) lie over
  `sequence` too; others are whole along it.

  Groups that the data shards do not divide (a run resumed on more devices keeps
  its groups) span devices: their layout is whole everywhere and routing costs
  communication, which is logged once. Results do not depend on it.

  Args:
    batch: arrays or shapes of all processes together.
    mesh: the device mesh.

  Raises:
    UserError: rows that the data shards do not divide, with the arithmetic; or
      such groups with several processes, which read whole groups.
  """
  shards = rules.data_shards(mesh)
  rows = batch.tokens.shape[0]
  if rows % shards:
    raise UserError(
      f"{rows} rows a step cannot be split over {shards} data shards"
      f" ({_shown(mesh)}); set config.train.batch_size to a multiple of {shards}"
    )
  first = NamedSharding(mesh, rules.spec((axes.ACT_BATCH,)))
  both = NamedSharding(mesh, rules.spec((axes.ACT_BATCH, axes.ACT_LENGTH)))
  split = batch.stored is not None
  shardings = jax.tree.map(lambda _: both if split else first, batch)
  if split:
    return shardings.replace(stored=first)
  if batch.layout is not None and batch.layout.place.shape[0] % shards:
    groups = batch.layout.place.shape[0]
    span = (
      f"{rows} rows make {groups} group(s) of {rows // groups} rows, which"
      f" cannot be split over {shards} data shards"
    )
    if jax.process_count() > 1:
      raise UserError(
        f"{span}; set config.data.group_rows to a divisor of {rows // shards}"
      )
    _warn_once(f"{span}: they span devices, and routing communicates")
    whole = jax.tree.map(lambda _: rules.replicated(mesh), batch.layout)
    shardings = shardings.replace(layout=whole)
  return shardings


def _shown(mesh: Mesh) -> str:
  return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in rules.BATCH)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
  """Makes global arrays of this process's rows.

  Args:
    batch: numpy arrays, this process's rows and groups (`process_share`).
    mesh: the devices of all processes.

  Raises:
    UserError: rows or groups that the data shards do not divide.
  """
  _, count = process_share(mesh)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype),
    batch,
  )
  # The transfer that is meant; with several processes jax does not see that.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.tree.map(
      lambda x, sharding, whole: jax.make_array_from_process_local_data(
        sharding, x, whole.shape
      ),
      batch,
      batch_shardings(shapes, mesh),
      shapes,
    )


def process_share(mesh: Mesh) -> tuple[int, int]:
  """Which equal share of a batch's rows this process reads.

  Processes whose devices hold the same rows (`tensor` or `sequence` spans them)
  read the same share.

  Args:
    mesh: the devices of all processes.

  Returns:
    `index, count`: the share is the index-th of count.

  Raises:
    UserError: the data axes lie across processes, so that shares would overlap.
  """
  return _share(mesh, jax.process_index())


@functools.cache
def _share(mesh: Mesh, process: int) -> tuple[int, int]:
  # Devices by data shard: one row of the array for each.
  last = [AXES.index(axis) for axis in AXES if axis not in rules.BATCH]
  grid = np.moveaxis(mesh.devices, last, range(-len(last), 0))
  shards: dict[int, set[int]] = {}
  for shard, devices in enumerate(grid.reshape(rules.data_shards(mesh), -1)):
    for device in devices:
      shards.setdefault(device.process_index, set()).add(shard)
  shares = sorted({tuple(sorted(held)) for held in shards.values()})
  if (
    len({shard for share in shares for shard in share})
    != sum(len(share) for share in shares)
    or len({len(share) for share in shares}) != 1
  ):
    raise UserError(
      f"the {rules.data_shards(mesh)} data shards ({_shown(mesh)}) lie across"
      f" {len(shards)} processes, so that each would read other rows; make"
      f" config.mesh.tensor x sequence divide the devices of a process, or be a"
      f" multiple of them"
    )
  return shares.index(tuple(sorted(shards[process]))), len(shares)


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)


def split_rows(batch: Batch, parts: int) -> Batch:
  """Deals the positions of each row to context-parallel devices.

  Each device gets every `parts`-th token of every tower, in sequence order. So
  all have the same counts per tower, routing stays on the device, and causal
  attention is shared out evenly (as Brandon et al., arXiv 2311.09431, stripe a
  row). What a query sees is still told in positions of the sequence, and
  `Batch.stored` says where each of those stands.

  Args:
    batch: numpy, in sequence order; its layout has groups of one row.
    parts: devices that share a row; 1 returns the batch as it is.

  Returns:
    The batch with its rows' positions reordered, device by device.

  Raises:
    UserError: a length, groups or counts that cannot be split, with the
      arithmetic.
  """
  if parts == 1:
    return batch
  rows, length = batch.tokens.shape
  take = (np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),)
  if batch.layout is not None:
    take = tuple(np.asarray(of_tower) for of_tower in batch.layout.take)
  groups, counts = take[0].shape[0], [of_tower.shape[1] for of_tower in take]
  check_split(rows // groups, counts, parts)
  chunks = [
    np.sort(np.concatenate([t[:, part::parts] for t in take], axis=1), axis=1)
    for part in range(parts)
  ]
  order = np.concatenate(chunks, axis=1)
  stored = np.argsort(order, axis=1).astype(np.int32)

  def reorder(x: np.ndarray) -> np.ndarray:
    index = order.reshape(order.shape + (1,) * (x.ndim - 2))
    return np.take_along_axis(x, index, axis=1)

  layout = None
  if batch.layout is not None:
    moved = tuple(
      np.take_along_axis(
        stored,
        np.concatenate([t[:, part::parts] for part in range(parts)], axis=1),
        axis=1,
      )
      for t in take
    )
    place = np.argsort(np.concatenate(moved, axis=1), axis=1).astype(np.int32)
    layout = Layout(moved, place)
  plain = jax.tree.map(reorder, dataclasses.replace(batch, layout=None))
  return dataclasses.replace(plain, layout=layout, stored=stored)


def check_split(group_rows: int, counts: Sequence[int], parts: int) -> None:
  """Refuses rows that context-parallel devices cannot share evenly.

  Args:
    group_rows: rows of a group of the layout.
    counts: places of each tower in a group.
    parts: devices that share a row.

  Raises:
    UserError: groups of several rows, or counts that do not divide.
  """
  if parts > 1 and group_rows != 1:
    raise UserError(
      f"config.mesh.sequence={parts} needs groups of one row and there are"
      f" {group_rows} rows to a group; set config.data.group_rows=1"
    )
  if any(count % parts for count in counts):
    raise UserError(
      f"config.mesh.sequence={parts} does not divide the places of a row,"
      f" {' + '.join(map(str, counts))}; choose config.data.row_length and"
      f" config.data.align as multiples of {parts}"
    )
