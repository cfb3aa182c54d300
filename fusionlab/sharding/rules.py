"""Rules from named axes to mesh axes, and the shardings they give."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from fusionlab.errors import UserError, nearest
from fusionlab.sharding import axes

# FSDP shards every parameter along its model width, tensor parallelism along its
# heads, FFN width or ids (Shoeybi et al., arXiv 1909.08053, section 3). Experts and
# memory tables lie over `expert`, which splits the batch too, as `data` and `fsdp`
# do. `sequence` splits the positions of a row. An axis without a rule is whole.
BATCH = ("data", "fsdp", "expert")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  axes.LAYERS: None,
  axes.VOCAB: "tensor",
  axes.EMBED: "fsdp",
  axes.HEADS: "tensor",
  axes.KV_HEADS: "tensor",
  axes.HEAD_DIM: None,
  axes.FFN: "tensor",
  axes.NORM: None,
  axes.EXPERT: "expert",
  axes.MEMORY_SLOT: "expert",
  axes.KERNEL: None,
  axes.CHANNELS: None,
  axes.ACT_BATCH: BATCH,
  axes.ACT_GROUP: BATCH,
  axes.ACT_LENGTH: "sequence",
  axes.ACT_EMBED: None,
}

# What a user changes where a parameter's axis does not divide.
_KEYS: Mapping[str, str] = {
  axes.VOCAB: "config.model.vocab_size",
  axes.EMBED: "config.model.dim",
  axes.HEADS: "config.model.num_heads",
  axes.KV_HEADS: "config.model.num_kv_heads",
  axes.FFN: "config.model.ffn_dim",
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
    twice = used.intersection(_mesh_axes(entry))
    if twice:
      raise UserError(
        f"axes {tuple(names)} put mesh axis {sorted(twice)} twice on one array"
      )
    used.update(_mesh_axes(entry))
    entries.append(entry)
  return PartitionSpec(*entries)


def is_names(x: Any) -> bool:
  """Whether `x` is the names of one array's axes, not a tree of such."""
  return isinstance(x, tuple) and all(
    name is None or isinstance(name, str) for name in x
  )


def _mesh_axes(entry: Any) -> tuple[str, ...]:
  """The mesh axes in an entry of a partition spec."""
  return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _parts(mesh: Mesh, entry: Any) -> int:
  """Number of parts that an entry of a partition spec makes."""
  return math.prod(mesh.shape[name] for name in _mesh_axes(entry))


def check_params(axes_tree: Any, abstract_tree: Any, mesh: Mesh) -> None:
  """Refuses a mesh that does not divide a model's parameters.

  Args:
    axes_tree: tuples of axis names, as `model.param_axes()` gives them.
    abstract_tree: the same tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: the device mesh.

  Raises:
    UserError: the first axis that does not divide, with the arithmetic and the
      nearest size that would do.
  """

  def check(names: tuple[str, ...], array: Any) -> None:
    for name, entry, size in zip(names, spec(names), array.shape, strict=True):
      parts = _parts(mesh, entry)
      if size % parts:
        raise UserError(
          f"config.mesh.{entry}={parts} does not divide {_KEYS.get(name, name)}"
          f"={size} ({size} = {size // parts} x {parts} + {size % parts});"
          f" choose a divisor, or {_KEYS.get(name, name)}="
          f"{size + -size % parts}"
        )

  jax.tree.map(check, axes_tree, abstract_tree, is_leaf=is_names)


def param_shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh) -> Any:
  """Sharding of every parameter.

  A model's own parameters divide (`check_params`). A part of one, as the rows of a
  table that are trained, may not: it stays whole along that axis.

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
          entry if size % _parts(mesh, entry) == 0 else None
          for entry, size in zip(entries, array.shape, strict=True)
        )
      ),
    )

  return jax.tree.map(one, axes_tree, abstract_tree, is_leaf=is_names)


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
  return math.prod(mesh.shape[axis] for axis in BATCH)


def sequence_shards(mesh: Mesh | None = None) -> int:
  """Number of parts a row is split into.

  Args:
    mesh: the devices; None: the mesh in scope, of which there may be none.
  """
  if mesh is not None:
    return mesh.shape["sequence"]
  scope = jax.sharding.get_abstract_mesh()
  return 1 if scope.empty else scope.shape["sequence"]


def _over(*names: str) -> tuple[str, ...]:
  """Mesh axes, of several parts, that `per_shard` has split these names over."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ()
  every = [axis for name in names for axis in _mesh_axes(RULES[name])]
  return tuple(
    dict.fromkeys(
      a for a in every if a in mesh.manual_axes and mesh.shape[a] > 1
    )
  )


def parts(name: str) -> int:
  """Number of parts that a named axis is in; within `per_shard`."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in _over(name))


def whole(x: jax.Array, axis: int, name: str) -> jax.Array:
  """All parts of an array, one after another; within `per_shard`.

  Its transpose sums over the devices and leaves each its own part. Where the
  mesh does not split the name, here as below: the array itself.

  Args:
    x: this device's part.
    axis: the dimension that is split.
    name: of `sharding.axes`, that dimension's.
  """
  over = _over(name)
  return jax.lax.all_gather(x, over, axis=axis, tiled=True) if over else x


def sum_to_part(x: jax.Array, axis: int, name: str) -> jax.Array:
  """Sums over the devices and leaves each its part; within `per_shard`.

  Args:
    x: a whole array, this device's addend.
    axis: the dimension to split.
    name: of `sharding.axes`, that dimension's.
  """
  over = _over(name)
  if not over:
    return x
  return jax.lax.psum_scatter(x, over, scatter_dimension=axis, tiled=True)


def sum_over(x: Any, *names: str, but: str = "") -> Any:
  """Sums arrays over the devices that split these names; within `per_shard`.

  Args:
    x: a tree of arrays.
    names: of `sharding.axes`.
    but: a name over whose devices nothing is summed.
  """
  skipped = _over(but) if but else ()
  over = tuple(axis for axis in _over(*names) if axis not in skipped)
  return jax.lax.psum(x, over) if over else x


def max_over(x: jax.Array, name: str) -> jax.Array:
  """The largest over the devices that split this name; within `per_shard`."""
  over = _over(name)
  return jax.lax.pmax(x, over) if over else x


def first_of_part(size: int, name: str) -> jax.Array:
  """Index at which this device's part begins; within `per_shard`.

  Args:
    size: of a part.
    name: of `sharding.axes`, the axis that is split.
  """
  return jax.lax.axis_index(_over(name)) * size


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
  f: Callable[..., Any], inputs: Any, outputs: Any, free: Sequence[str] = ()
) -> Callable[..., Any]:
  """Runs a function on each device's own part of its arguments.

  For what the partitioner cannot split, kernels and loops over the batch, and
  where it would communicate more than is needed. Parts meet only where `f` says
  so (`whole`, `sum_over`, ...).

  Args:
    f: of arrays.
    inputs: for each argument the names of `sharding.axes` of its leading axes,
      () for a whole copy; or a tree of such tuples, as the argument is one.
    outputs: the same for the result.
    free: names along which the partitioner goes on to split what `f` does.

  Returns:
    A function of the whole arrays; without a mesh of several devices in scope,
    `f` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return f
  left = {axis for entry in spec(free) for axis in _mesh_axes(entry)}

  return jax.shard_map(
    f,
    mesh=mesh,
    in_specs=jax.tree.map(spec, tuple(inputs), is_leaf=is_names),
    out_specs=jax.tree.map(spec, outputs, is_leaf=is_names),
    axis_names=set(mesh.axis_names) - left,
    check_vma=False,
  )


def in_mesh(mesh: Mesh):
  """Context in which `constrain` acts; enter it inside the traced function."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
