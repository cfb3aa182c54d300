"""Rows of a table by id, whatever lies where."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.sharding import axes
from fusionlab.sharding.rules import (
  first_of_part,
  parts,
  per_shard,
  sum_over,
  sum_to_part,
  whole,
)

_TABLE = (axes.VOCAB, axes.EMBED)


def lookup(
  table: Float[Array, "V d"],
  tokens: Int[Array, "B L"],
  dtype: Any,
  names: Sequence[str],
) -> Float[Array, "B L d"]:
  """Embeddings in the compute dtype; their gradient is summed in float32.

  bfloat16 cannot hold the long sum of a frequent id. A table that lies over
  several devices is gathered along its width in the compute dtype, and along its
  ids each device looks up its own (Shoeybi et al., arXiv 1909.08053, section 3).

  Args:
    table: float32.
    tokens: ids, 0..V-1.
    dtype: of the result.
    names: of `sharding.axes`, for the leading axes of `tokens`.
  """
  return _lookup(jnp.dtype(dtype), tuple(names), table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(dtype: Any, names: tuple[str, ...], table: Any, tokens: Any):
  def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
    if parts(axes.EMBED) > 1:
      table = whole(table.astype(dtype), 1, axes.EMBED)
    index, mine = _own(tokens, table.shape[0])
    return sum_over(mine(table[index].astype(dtype)), axes.VOCAB)

  return per_shard(local, (_TABLE, names), names)(table, tokens)


def _own(
  tokens: jax.Array, size: int
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Index into this device's ids, and what makes 0 of the rows of others."""
  if parts(axes.VOCAB) == 1:
    return tokens, lambda rows: rows
  index = tokens - first_of_part(size, axes.VOCAB)
  here = (index >= 0) & (index < size)
  return (
    jnp.where(here, index, 0),
    lambda rows: jnp.where(here[..., None], rows, 0),
  )


def _forward(dtype: Any, names: tuple[str, ...], table: Any, tokens: Any):
  return _lookup(dtype, names, table, tokens), (table, tokens)


def _backward(dtype: Any, names: tuple[str, ...], saved: Any, g: Any):
  del dtype

  def local(table: jax.Array, tokens: jax.Array, g: jax.Array) -> jax.Array:
    ids, width = table.shape[0], g.shape[-1]
    index, mine = _own(tokens, ids)
    gradient = jnp.zeros((ids, width), table.dtype)
    gradient = gradient.at[index].add(mine(g).astype(table.dtype))
    gradient = sum_to_part(gradient, 1, axes.EMBED)
    return sum_over(gradient, *names, but=axes.EMBED)

  return per_shard(local, (_TABLE, names, names), _TABLE)(*saved, g), None


_lookup.defvjp(_forward, _backward)
