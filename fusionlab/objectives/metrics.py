"""Means that add up: over microbatches, devices and evaluation batches."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class Mean:
  """A total and what it is divided by; `+` merges two.

  Attributes:
    total: float32 sum.
    count: float32 weight of the sum.
  """

  total: Float[Array, ""]
  count: Float[Array, ""]

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """Total / count; NaN where nothing was counted."""
    return jnp.where(self.count > 0, self.total / self.count, jnp.nan)
