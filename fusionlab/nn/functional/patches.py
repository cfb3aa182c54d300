"""Grids of latents and their patches, and the noise level as features."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of the slowest feature, in timesteps: Vaswani et al. 2017, §3.5.
_LONGEST = 10_000.0


def space_to_depth(
  x: Float[Array, "N H W C"], side: int
) -> Float[Array, "N h w D"]:
  """Folds squares of `side` positions into channels: (row, column, channel)."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // side, side, width // side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height // side, width // side, side * side * channels)


def depth_to_space(
  x: Float[Array, "N h w D"], side: int
) -> Float[Array, "N H W C"]:
  """Inverse of `space_to_depth`."""
  n, height, width, depth = x.shape
  channels = depth // (side * side)
  x = x.reshape(n, height, width, side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height * side, width * side, channels)


def patchify(x: Float[Array, "N S S c"], side: int) -> Float[Array, "N n C"]:
  """Cuts square pictures into patches in raster order.

  Args:
    x: any values, of a side that `side` divides.
    side: k, positions of a patch's side; C = k·k·c, ordered (row, column,
      channel).
  """
  folded = space_to_depth(x, side)
  return folded.reshape(x.shape[0], -1, folded.shape[-1])


def unpatchify(x: Float[Array, "N n C"], side: int) -> Float[Array, "N S S c"]:
  """Inverse of `patchify`.

  Args:
    x: patches of square pictures, n a square number.
    side: k, positions of a patch's side.
  """
  n, count, depth = x.shape
  along = math.isqrt(count)
  return depth_to_space(x.reshape(n, along, along, depth), side)


def time_features(
  time: Float[Array, "*s"], width: int
) -> Float[Array, "*s {width}"]:
  """Sines, then cosines, of the timestep 1000·time; float32.

  Source: Vaswani et al. 2017 (arXiv 1706.03762), §3.5, of the timestep in place
  of the position as in DDPM (arXiv 2006.11239), appendix B, with 1000 timesteps.

  Args:
    time: noise level 0..1, float32 (bfloat16 cannot tell timesteps apart).
    width: number of features, even.
  """
  half = width // 2
  frequency = _LONGEST ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = 1000 * time.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def time_embedding(
  time: Float[Array, "*s"],
  w1: Float[Array, "f h"],
  w2: Float[Array, "h e"],
) -> Float[Array, "*s e"]:
  """The noise level through two layers: silu(features w1) w2.

  Args:
    time: noise level 0..1, float32.
    w1: of an even number f of features, in the dtype to compute in.
    w2: the second layer, in that dtype.
  """
  features = time_features(time, w1.shape[0]).astype(w1.dtype)
  return jax.nn.silu(features @ w1) @ w2
