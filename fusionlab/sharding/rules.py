"""Rules from named axes to mesh axes, and the shardings they give."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from fusionlab.batch import Batch
from fusionlab.errors import UserError, nearest
from fusionlab.sharding import axes

# FSDP shards every parameter along its model width; the batch and the groups of
# the layout are split over both data axes. An axis without a rule is whole.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  axes.LAYERS: None,
  axes.VOCAB: None,
  axes.EMBED: "fsdp",
  axes.HEADS: None,
  axes.KV_HEADS: None,
  axes.HEAD_DIM: None,
  axes.FFN: None,
  axes.NORM: None,
  axes.ACT_BATCH: ("data", "fsdp"),
  axes.ACT_GROUP: ("data", "fsdp"),
  axes.ACT_LENGTH: None,
  axes.ACT_EMBED: None,
}


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """Partition spec of an array whose axes bear these names.

  Raises:
    UserError: an unknown name, or two names on one mesh axis.
  """
  used: set[str] = set()
  entries = []
  for name in names:
    if name is not None and name not in RULES:
      raise UserError(f"unknown axis name {name!r}{nearest(name, RULES)}")
    entry = None if name is None else RULES[name]
    mesh_axes = (
      () if entry is None else (entry,) if isinstance(entry, str) else entry
    )
    if used & set(mesh_axes):
      raise UserError(
        f"axes {tuple(names)} put mesh axis {sorted(used & set(mesh_axes))}"
        f" twice on one array"
      )
    used |= set(mesh_axes)
    entries.append(entry)
  return PartitionSpec(*entries)


def _fits(mesh: Mesh, entry: Any, size: int) -> bool:
  names = () if entry is None else (entry,) if isinstance(entry, str) else entry
  return size % math.prod(mesh.shape[name] for name in names) == 0


def param_shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh) -> Any:
  """Sharding of every parameter.

  A parameter whose axis the mesh axis does not divide stays whole along it.

  Args:
    axes_tree: tuples of axis names, as `model.param_axes()` gives them.
    abstract_tree: the same tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: the device mesh.

  Returns:
    The same tree of `NamedSharding`.
  """

  def one(names: tuple[str, ...], array: Any) -> NamedSharding:
    entries = spec(names)
    return NamedSharding(
      mesh,
      PartitionSpec(
        *(
          entry if _fits(mesh, entry, size) else None
          for entry, size in zip(entries, array.shape, strict=True)
        )
      ),
    )

  return jax.tree.map(
    one, axes_tree, abstract_tree, is_leaf=lambda x: isinstance(x, tuple)
  )


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
  """Sharding of every array of a batch: rows and groups over the data axes.

  Groups that the data shards do not divide (a run resumed on more devices keeps
  its groups) span devices: their layout is whole everywhere and routing costs
  communication, which is logged once. Results do not depend on it.

  Raises:
    UserError: rows that the data shards do not divide, with the arithmetic; or
      such groups with several processes, which read whole groups.
  """
  shards = data_shards(mesh)
  rows = batch.tokens.shape[0]
  if rows % shards:
    raise UserError(
      f"{rows} rows a step cannot be split over {shards} data shards"
      f" (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); set"
      f" config.train.batch_size to a multiple of {shards}"
    )
  first = NamedSharding(mesh, spec((axes.ACT_BATCH,)))
  shardings = jax.tree.map(lambda _: first, batch)
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
    whole = jax.tree.map(lambda _: replicated(mesh), batch.layout)
    shardings = shardings.replace(layout=whole)
  return shardings


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def replicated_beside(params: Any) -> Sharding:
  """The sharding that keeps a whole copy on every device that has parameters."""
  sharding = jax.tree.leaves(params)[0].sharding
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def data_shards(mesh: Mesh) -> int:
  """Number of parts the batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  """Pins an activation's sharding where a mesh is in scope; else the array.

  Args:
    x: an activation.
    names: a name of `sharding.axes` for each leading axis; the rest is whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  names = (*names, *(None,) * (x.ndim - len(names)))
  return jax.lax.with_sharding_constraint(x, spec(names))


def per_shard(
  f: Callable[..., jax.Array],
  inputs: Sequence[Sequence[str | None]],
  output: Sequence[str | None],
) -> Callable[..., jax.Array]:
  """Runs a function on each device's own part of its arguments.

  For what the partitioner cannot split: kernels, and loops over the batch. No
  part sees another, so nothing is communicated but what brings an argument that
  lies otherwise into the given split.

  Args:
    f: of arrays; every axis that is split must be independent of the others.
    inputs: for each argument, a name of `sharding.axes` for each leading axis.
    output: the same for the result.

  Returns:
    A function of the whole arrays; without a mesh of several devices in scope,
    `f` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return f
  return jax.shard_map(
    f,
    mesh=mesh,
    in_specs=tuple(spec(names) for names in inputs),
    out_specs=spec(output),
    check_vma=False,
  )


def in_mesh(mesh: Mesh):
  """Context in which `constrain` acts; enter it inside the traced function."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
