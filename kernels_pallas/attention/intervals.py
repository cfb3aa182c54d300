"""Intervals as kernels want them: none empty, none past the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def fill_empty(
  k_start: Int[Array, "B Q"], k_end: Int[Array, "B Q"], keys: int
) -> tuple[Bool[Array, "B Q"], Int[Array, "B Q"], Int[Array, "B Q"]]:
  """Gives every query a key to see.

  A softmax over nothing is 0/0. A query with an empty interval gets [0, 1)
  instead, and `blank` takes its output away again.

  Args:
    k_start: first key that a query sees.
    k_end: one past the last.
    keys: how many there are.

  Returns:
    Which queries truly see a key, and the filled intervals.
  """
  k_start, k_end = jnp.maximum(k_start, 0), jnp.minimum(k_end, keys)
  sees = k_start < k_end
  return sees, jnp.where(sees, k_start, 0), jnp.where(sees, k_end, 1)


def blank(
  out: Float[Array, "B Q H D"], sees: Bool[Array, "B Q"]
) -> Float[Array, "B Q H D"]:
  """Sets the outputs of queries that see nothing to 0, and so their gradients.

  Args:
    out: the kernel's, finite.
    sees: of `fill_empty`.
  """
  return jnp.where(sees[:, :, None, None], out, 0)


def pad_length(x: Array, multiple: int) -> jax.Array:
  """Adds zeros along axis 1 up to a multiple; an interval of zeros is empty.

  Args:
    x: [B, L, ...].
    multiple: what the new length is a multiple of.
  """
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % multiple)
  return jnp.pad(x, widths)
