"""Rotary position embedding on positions within the document.

Source: RoFormer (arXiv 2104.09864), Eq. 34, with feature i paired with i + D/2
(the half-split order of the Llama weights that Hugging Face publishes; the
interleaved order differs by a permutation of the features).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(
  position: Int[Array, "B L"], *, head_dim: int, base: float
) -> Float[Array, "B L {head_dim}//2"]:
  """Angles position · base^(−2i/D), float32, in radians.

  Args:
    position: position within the document, from 0.
    head_dim: D, even.
    base: 10,000 in Llama.
  """
  frequency = base ** (
    -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  )
  return position[..., None].astype(jnp.float32) * frequency


def rotate(
  x: Float[Array, "B L H D"],
  cos: Float[Array, "B L D/2"],
  sin: Float[Array, "B L D/2"],
) -> Float[Array, "B L H D"]:
  """Rotates each pair (i, i + D/2) by its angle; float32 inside.

  Args:
    x: queries or keys.
    cos: cosine of `rotary_angles`.
    sin: sine of `rotary_angles`.
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
