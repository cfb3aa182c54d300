"""How a token finds its parameters: towers, the layout, route and unroute.

A token is processed by the parameters of its tower, and tokens of all towers
meet in the mixer. The routed stream is a tuple with one contiguous array per
tower, so that every routed linear and norm is a plain dense operation. Moves
between sequence order and routed order are gathers both ways; route and unroute
are each other's transpose, so no scatter enters the step.

Source: Mixture-of-Transformers (arXiv 2411.04996), Eq. 1-3 and Algorithm 1; the
layout replaces its boolean masks.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from fusionlab.errors import UserError
from fusionlab.sharding import axes
from fusionlab.sharding.rules import per_shard, sequence_shards
from fusionlab.towers import Towers

Array = jax.Array | np.ndarray
Routed: TypeAlias = tuple[jax.Array, ...]
# Of arrays that are split along their second axis too, positions or places.
_PLACES = (axes.ACT_GROUP, axes.ACT_LENGTH)


@flax.struct.dataclass
class Layout:
  """A permutation of each group's positions into its towers' arrays.

  A group is `R` whole rows; its `N = R·L` positions are numbered in row-major
  order. The counts `C_k` are static and sum to `N`.

  Attributes:
    take: per tower, int32 [G, C_k]: the position that stands at each place.
    place: int32 [G, N]: where each position stands, counted through the towers'
      arrays one after another.
  """

  take: tuple[Int[Array, "G _"], ...]
  place: Int[Array, "G N"]

  def within(self, parts: int) -> "Layout":
    """The layout of each part of a split row, counted within the part.

    Args:
      parts: equal parts of which each holds the same share of every tower's
        places, part after part (`fusionlab.sharding.batches.split_rows`).
    """
    if parts == 1:
      return self
    size = self.place.shape[1] // parts
    place, start = jnp.zeros_like(self.place), 0
    for take in self.take:
      count = take.shape[1]
      rank = jnp.asarray(self.place) - start
      here = (rank >= 0) & (rank < count)
      local = start // parts + rank % (count // parts)
      place = jnp.where(here, local, place)
      start += count
    return Layout(tuple(take % size for take in self.take), place)


def make_layout(
  modality: Int[Array, "B L"],
  real: Bool[Array, "B L"],
  *,
  towers: Sequence[int],
  counts: Sequence[int],
  group_rows: int,
) -> Layout:
  """Deals the positions of each group to its towers' places.

  Tokens keep their sequence order within a tower; padding positions fill the
  places that are left, so the result is a permutation. numpy arrays give numpy
  arrays (the loader); traced arrays work under jit with the same static counts.

  Args:
    modality: modality id of each position.
    real: False on padding.
    towers: tower of each modality.
    counts: places of each tower in a group, summing to `group_rows`·L.
    group_rows: rows of a group; divides B.

  Raises:
    UserError: counts that do not sum to the group, rows that do not divide, or
      (numpy only) a tower with more tokens than places.
  """
  xp = np if isinstance(modality, np.ndarray) else jnp
  rows, length = modality.shape
  size = group_rows * length
  if rows % group_rows or sum(counts) != size:
    raise UserError(
      f"layout: {rows} rows of {length} do not make groups of {group_rows} rows"
      f" with {' + '.join(map(str, counts))} places ({size} needed)"
    )
  tower = xp.asarray(towers, xp.int32)[modality].reshape(-1, size)
  real = real.reshape(-1, size)
  tower_ids = xp.arange(len(counts), dtype=xp.int32)
  used = ((tower[..., None] == tower_ids) & real[..., None]).sum(1)
  free = xp.asarray(counts, xp.int32) - used
  if xp is np and (free < 0).any():
    group, k = np.argwhere(free < 0)[0]
    raise UserError(
      f"layout: group {group} has {used[group, k]} tokens for tower {k}, which"
      f" has {counts[k]} places"
    )
  # The r-th padding position goes to the first tower whose free places, summed
  # up to and with it, exceed r.
  rank = xp.cumsum(~real, axis=1) - 1
  dealt = (rank[..., None] >= xp.cumsum(free, axis=1)[:, None]).sum(-1)
  tower = xp.where(real, tower, dealt)
  if xp is np:
    order = np.argsort(tower, axis=1, kind="stable").astype(np.int32)
    place = np.argsort(order, axis=1, kind="stable").astype(np.int32)
  else:
    order = jnp.argsort(tower, axis=1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
  starts = np.cumsum((0, *counts))
  take = tuple(order[:, a:b] for a, b in itertools.pairwise(starts))
  return Layout(take=take, place=place)


def _gather(x: Array, index: Array) -> jax.Array:
  """Rows `index` [G, M] of `x` [G, N, ...]."""
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _apart(x: Array, layout: Layout) -> Routed:
  return tuple(_gather(x, take) for take in layout.take)


def _together(routed: Routed, layout: Layout) -> jax.Array:
  return _gather(jnp.concatenate(routed, axis=1), layout.place)


# Split rows: each device moves its own positions, by a layout that counts them.
# The derivatives stand outside of `per_shard`, whose own would sum them over the
# devices that hold the same positions.
def _moved(f: Callable[..., Any], split: bool) -> Callable[..., Any]:
  if not split:
    return f
  return per_shard(f, (_PLACES, _PLACES), _PLACES, free=(axes.HEADS,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _route(x: Array, layout: Layout, split: bool = False) -> Routed:
  return _moved(_apart, split)(x, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unroute(routed: Routed, layout: Layout, split: bool = False) -> jax.Array:
  return _moved(_together, split)(routed, layout)


def _no_gradient(layout: Layout) -> Layout:
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), layout)


_route.defvjp(
  lambda x, layout, split: (_route(x, layout, split), layout),
  lambda split, layout, g: (
    _unroute(g, layout, split),
    _no_gradient(layout),
  ),
)
_unroute.defvjp(
  lambda routed, layout, split: (_unroute(routed, layout, split), layout),
  lambda split, layout, g: (_route(g, layout, split), _no_gradient(layout)),
)


@jax.custom_vjp
def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  return x @ weight


def _linear_backward(
  saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  # XLA's CPU backend transposes the first operand of xᵀg and fuses that with
  # whatever made it. Autodiff puts g first, so the activation's derivative ran
  # against the grain of memory: a SwiGLU's gradient took 2.5x as long.
  x, weight = saved
  return g @ weight.T, jnp.einsum("...d,...f->df", x, g)


_linear.defvjp(lambda x, weight: (x @ weight, (x, weight)), _linear_backward)


def route(
  x: Float[Array, "B L *f"], layout: Layout | None, *, split: bool = False
) -> Routed:
  """Moves a sequence-order array into one array per tower, by gathers.

  Args:
    x: any features in sequence order.
    layout: the batch's layout; None leaves one tower in sequence order.
    split: whether the positions of rows lie over devices, in groups of one row,
      and `layout` counts within a device's part.

  Returns:
    Per tower `[G, C_k, *f]`; `([B, L, *f],)` without a layout.
  """
  if layout is None:
    return (jnp.asarray(x),)
  groups, size = layout.place.shape
  return _route(x.reshape(groups, size, *x.shape[2:]), layout, split)


def unroute(
  routed: Routed, layout: Layout | None, length: int, *, split: bool = False
) -> Float[Array, "B L *f"]:
  """Moves one array per tower back into sequence order: route's inverse.

  Args:
    routed: per tower `[G, C_k, *f]`.
    layout: the layout that made them.
    length: L, tokens in a row.
    split: see `route`.
  """
  if layout is None:
    return routed[0]
  x: jax.Array = _unroute(routed, layout, split)
  return x.reshape(-1, length, *x.shape[2:])


@flax.struct.dataclass
class Router:
  """Carries out the routing of one batch; made once, shared by all layers.

  A stream is a tuple of arrays. With `layout` it holds one array per tower;
  `select` keeps sequence order and runs every tower on every token (the tests'
  oracle); `present` does so with the towers that occur and reads no other's
  parameters (decoding, which is bound by reading them); `ragged` keeps one array
  sorted by tower for `jax.lax.ragged_dot`.
  A stream in sequence order is a tuple of one array.

  Attributes:
    layout: the batch's layout; None with one tower.
    tower: int32 [B, L], tower of each position (`select`).
    length: L.
    dispatch: "layout", "ragged", "select" or "present".
    subset: for "present", index into `subsets` of the towers that occur.
    split: whether rows lie over context-parallel devices, each of which routes its
      own positions; `layout` then counts within a device's part.
  """

  layout: Layout | None
  tower: Int[Array, "B L"] | None
  length: int = flax.struct.field(pytree_node=False)
  dispatch: str = flax.struct.field(pytree_node=False)
  subset: Int[Array, ""] | None = None
  split: bool = flax.struct.field(pytree_node=False, default=False)

  def enter(self, stream: Routed) -> Routed:
    """Sequence order to routed order."""
    if self.layout is None:
      return stream
    routed = route(stream[0], self.layout, split=self.split)
    if self.dispatch == "ragged":
      return (_join(routed),)
    return routed

  def leave(self, stream: Routed) -> Routed:
    """Routed order to sequence order."""
    if self.layout is None:
      return stream
    if self.dispatch == "ragged":
      stream = self._split(stream[0])
    x = unroute(stream, self.layout, self.length, split=self.split)
    return (jnp.asarray(x),)

  def apply(
    self, f: Callable[..., jax.Array], stream: Routed, *weights: Routed
  ) -> Routed:
    """Runs `f(x, *weights of its tower)` for each tower.

    Args:
      f: a position-wise function.
      stream: routed, or in sequence order where `weights` are shared.
      *weights: each a tuple with one array per tower, or of one shared array.
    """
    towers = max(map(len, weights), default=1)
    if towers == 1:
      return tuple(f(x, *(w[0] for w in weights)) for x in stream)
    per_tower = list(
      zip(*(w if len(w) > 1 else w * towers for w in weights), strict=True)
    )
    if self.dispatch in ("select", "present"):
      tower = jnp.asarray(self.tower)

      def run(which: Sequence[int], x: jax.Array) -> jax.Array:
        first, *others = which
        y = f(x, *per_tower[first])
        for k in others:
          chosen = (tower == k).reshape(tower.shape + (1,) * (y.ndim - 2))
          y = jnp.where(chosen, f(x, *per_tower[k]), y)
        return y

      if self.subset is None:
        return (run(range(towers), stream[0]),)
      branches = [functools.partial(run, which) for which in subsets(towers)]
      return (jax.lax.switch(self.subset, branches, stream[0]),)
    if self.dispatch == "ragged":
      split = self._split(stream[0])
      return (
        _join(tuple(f(x, *ws) for x, ws in zip(split, per_tower, strict=True))),
      )
    return tuple(f(x, *ws) for x, ws in zip(stream, per_tower, strict=True))

  def linear(self, stream: Routed, weight: Routed) -> Routed:
    """Multiplies each tower's tokens by its matrix, [..., d] by [d, f]."""
    if self.dispatch == "ragged" and len(weight) > 1:
      (x,) = stream
      y = jax.lax.ragged_dot(
        x.reshape(-1, x.shape[-1]),
        jnp.stack(weight),
        jnp.asarray([take.size for take in self._take], jnp.int32),
      )
      return (y.reshape(1, -1, y.shape[-1]),)
    return self.apply(_linear, stream, weight)

  def _split(self, x: jax.Array) -> Routed:
    groups = self._take[0].shape[0]
    ends = np.cumsum([take.size for take in self._take])[:-1]
    return tuple(
      part.reshape(groups, -1, *x.shape[2:])
      for part in jnp.split(x, ends, axis=1)
    )

  @property
  def _take(self) -> tuple[Array, ...]:
    if self.layout is None:
      raise ValueError("a router without layout has no routed order")
    return self.layout.take


def _join(routed: Routed) -> jax.Array:
  """All towers' tokens one after another: [1, G·N, ...]."""
  return jnp.concatenate(
    [x.reshape(1, -1, *x.shape[2:]) for x in routed], axis=1
  )


def subsets(towers: int) -> list[tuple[int, ...]]:
  """Sets of towers that `present` has a branch for, by size, all of them last.

  All subsets of up to three towers; of more, single ones, pairs and all.
  """
  sizes = range(1, towers + 1) if towers <= 3 else (1, 2, towers)
  return [s for n in sizes for s in itertools.combinations(range(towers), n)]


def make_router(
  towers: Towers,
  layout: Layout | None,
  modality: Int[Array, "B L"],
  dispatch: str,
  *,
  real: Bool[Array, "B L"] | None = None,
  split: bool = False,
) -> Router:
  """Prepares the routing of a batch.

  Args:
    towers: of the model.
    layout: the batch's; needed by `layout` and `ragged` with several towers.
    modality: the batch's modality ids.
    dispatch: "layout", "ragged", "select" or "present".
    real: for "present", the positions that count; default all.
    split: whether the rows were dealt to the context-parallel devices of the
      mesh in scope.

  Raises:
    UserError: several towers and no layout, a layout of other towers, or split
      rows and "ragged", which sorts the tokens of all rows together.
  """
  length = modality.shape[1]
  if towers.count == 1:
    return Router(None, None, length, "layout")
  tower = jnp.asarray(towers.of_modality, jnp.int32)[modality]
  if dispatch == "select":
    return Router(None, tower, length, dispatch)
  if dispatch == "present":
    every = np.arange(towers.count)
    occurs = tower[..., None] == every
    if real is not None:
      occurs &= real[..., None]
    occurs = occurs.any(axis=(0, 1))
    # The first subset that has all that occur is the smallest one.
    has = np.array([np.isin(every, s) for s in subsets(towers.count)])
    subset = jnp.argmax((has | ~occurs).all(axis=1))
    return Router(None, tower, length, dispatch, subset)
  if layout is None:
    raise UserError(
      f"the model has towers {towers.names} and the batch no layout; make it"
      f" with fusionlab.routing.make_layout"
    )
  if len(layout.take) != towers.count:
    raise UserError(
      f"the batch's layout has {len(layout.take)} towers and the model"
      f" {towers.count} ({', '.join(towers.names)})"
    )
  parts = sequence_shards() if split else 1
  if parts > 1 and dispatch == "ragged":
    raise UserError(
      f"config.model.dispatch=ragged cannot be split over"
      f" config.mesh.sequence={parts}; use config.model.dispatch=layout"
    )
  return Router(layout.within(parts), tower, length, dispatch, split=parts > 1)
