"""Norms over the last axis, in float32 whatever comes in.

RMSNorm's sums are written as products, which XLA's CPU backend does several times as
fast as reductions (measured there only).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EXACT = jax.lax.Precision.HIGHEST


def rms_norm(
  x: Float[Array, "*s d"], scale: Float[Array, " d"], *, eps: float
) -> Float[Array, "*s d"]:
  """X · rsqrt(mean x² + eps) · scale (Zhang & Sennrich 2019, Eq. 4).

  The backward pass keeps x alone.

  Args:
    x: any dtype; the result has it too.
    scale: float32.
    eps: added to the mean square.
  """
  return _rms_norm(eps, x, scale)


def _unit(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
  """Divides by the root mean square; also its inverse. Float32."""
  x = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(_mean_of_product(x, x) + eps)
  return x * inverse, inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
  return (_unit(x, eps)[0] * scale).astype(x.dtype)


def _rms_norm_backward(
  eps: float, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, scale = saved
  y, inverse = _unit(x, eps)
  g = g.astype(jnp.float32)
  d_scale = _sum_over_rows(g * y)
  g = g * scale
  d_x = (g - y * _mean_of_product(g, y)) * inverse
  return d_x.astype(x.dtype), d_scale


_rms_norm.defvjp(
  lambda eps, x, scale: (_rms_norm(eps, x, scale), (x, scale)),
  _rms_norm_backward,
)


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
  y = y * jax.lax.rsqrt(_mean_of_product(y, y) + eps)
  return (y * scale + bias).astype(x.dtype)


def _mean_of_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """[..., 1] of two arrays [..., d]."""
  total = jnp.einsum("...d,...d->...", a, b, precision=_EXACT)
  return total[..., None] / a.shape[-1]


def _sum_over_rows(x: jax.Array) -> jax.Array:
  """[d] of an array [..., d]."""
  # Not by a reshape: axes that lie over devices cannot be joined.
  over = tuple(range(x.ndim - 1))
  ones = jnp.ones(x.shape[:-1], x.dtype)
  return jax.lax.dot_general(ones, x, ((over, over), ((), ())), _EXACT)
