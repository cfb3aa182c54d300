"""Norms over the last axis, in float32 whatever comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
  x: Float[Array, "*s d"], scale: Float[Array, " d"], *, eps: float
) -> Float[Array, "*s d"]:
  """X · rsqrt(mean x² + eps) · scale (Zhang & Sennrich 2019, Eq. 4).

  Args:
    x: any dtype; the result has it too.
    scale: float32.
    eps: added to the mean square.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


def layer_norm(
  x: Float[Array, "*s d"],
  scale: Float[Array, " d"],
  bias: Float[Array, " d"],
  *,
  eps: float,
) -> Float[Array, "*s d"]:
  """(x − mean) · rsqrt(var + eps) · scale + bias (Ba et al. 2016, Eq. 4).

  Args:
    x: any dtype; the result has it too.
    scale: float32.
    bias: float32.
    eps: added to the variance.
  """
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale + bias).astype(x.dtype)
