"""Patches of latents to hidden states and back by one matrix each.

Source: Transfusion (arXiv 2408.11039), §3.2, the linear alternative: the noise
level's embedding is added to every patch before the matrix. Like the decoder's
other matrices these have no bias.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionlab.nn.functional.patches import time_embedding
from fusionlab.nn.parameters import fan_in
from fusionlab.sharding import axes

# Sines and cosines of the noise level.
TIME_FEATURES = 128


class LinearPatches(nn.Module):
  """W_in(patch + embedding of the noise level), and W_out of hidden states.

  `enter` and `leave` read the same parameters, and either declares them all.
  W_out starts at zero: the first predictions are the mean of what is predicted
  (latents and noise have mean 0), so that no noise of a random matrix reaches the
  layers below, which may be pretrained. They get no gradient at the first step.

  Attributes:
    dim: width d of the hidden states.
    latent_dim: values C of a patch.
  """

  dim: int
  latent_dim: int

  def setup(self) -> None:
    """Declares the parameters of both ways."""
    d, c, f = self.dim, self.latent_dim, TIME_FEATURES
    inner = (axes.CHANNELS, axes.CHANNELS)
    self.time_w1 = weight(self, "time_w1", (f, f), inner, fan_in(f))
    self.time_w2 = weight(self, "time_w2", (f, c), inner, fan_in(f))
    self.w_in = weight(
      self, "w_in", (c, d), (axes.CHANNELS, axes.EMBED), fan_in(c)
    )
    self.w_out = weight(
      self,
      "w_out",
      (d, c),
      (axes.EMBED, axes.CHANNELS),
      nn.initializers.zeros,
    )

  def enter(
    self, latents: Float[Array, "*s C"], time: Float[Array, "*s"]
  ) -> Float[Array, "*s d"]:
    """Noisy patches to hidden states, in the dtype of the patches.

    Args:
      latents: in the dtype to compute in.
      time: their noise level 0..1, float32.
    """
    dtype = latents.dtype
    embedding = time_embedding(
      time, self.time_w1.astype(dtype), self.time_w2.astype(dtype)
    )
    return (latents + embedding) @ self.w_in.astype(dtype)

  def leave(self, hidden: Float[Array, "*s d"]) -> Float[Array, "*s C"]:
    """Hidden states after the final norm to predictions, float32."""
    return jnp.matmul(
      hidden,
      self.w_out.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  @property
  def flops_per_position(self) -> int:
    """FLOPs of a position's forward pass, both ways; a multiply-add is two."""
    d, c, f = self.dim, self.latent_dim, TIME_FEATURES
    return 2 * (f * f + f * c + 2 * c * d)


def weight(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  names: tuple[str, ...],
  init: Any,
) -> jax.Array:
  """Declares a float32 parameter within a module's `setup`.

  Args:
    module: whose parameter it is.
    name: in the module's tree.
    shape: its sizes.
    names: of `fusionlab.sharding.axes`, one per dimension.
    init: (key, shape, dtype) -> array.
  """
  boxed: Any = nn.with_partitioning(init, names)
  return module.param(name, boxed, shape, jnp.float32)
