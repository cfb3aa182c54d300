"""Attention, plainly: the definition every implementation is held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  scale: float,
) -> Float[Array, "B Q H D"]:
  """softmax(scale · q kᵀ) v over the keys [k_start, k_end) of each query.

  Holds the B·H·Q·S scores. Softmax in float32; a query with an empty interval
  gives 0.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys.
    v: values.
    k_start: first key that a query sees.
    k_end: one past the last.
    scale: usually D^(−1/2).
  """
  rows, queries, heads, width = q.shape
  groups = k.shape[2]
  q = q.reshape(rows, queries, groups, heads // groups, width)
  scores = jnp.einsum(
    "BQGRD,BSGD->BGRQS", q, k, preferred_element_type=jnp.float32
  )
  key = jnp.arange(k.shape[1])
  seen = (key >= k_start[..., None]) & (key < k_end[..., None])
  seen = seen[:, None, None]
  weights = jax.nn.softmax(scores * scale, axis=-1, where=seen)
  # `where` leaves NaN in a row that sees nothing.
  weights = jnp.where(seen, weights, 0.0).astype(v.dtype)
  out = jnp.einsum("BGRQS,BSGD->BQGRD", weights, v)
  return out.reshape(rows, queries, heads, width)
