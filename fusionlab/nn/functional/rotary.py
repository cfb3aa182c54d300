"""Rotary position embedding on positions within the document.

Source: RoFormer (arXiv 2104.09864), Eq. 34, with feature i paired with i + D/2
(the half-split order of the Llama weights that Hugging Face publishes; the
interleaved order differs by a permutation of the features). The scalings stretch
the frequencies of a trained model to documents longer than it saw.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_frequencies(
  *, head_dim: int, base: float
) -> Float[Array, "{head_dim}//2"]:
  """Frequencies base^(−2i/D), float32, in radians per position.

  Args:
    head_dim: D, even.
    base: 10,000 in Llama.
  """
  return base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def rotary_angles(
  position: Int[Array, "B L"], frequency: Float[Array, " half"]
) -> Float[Array, "B L half"]:
  """Angles position · frequency, float32, in radians.

  Args:
    position: position within the document, from 0.
    frequency: of `rotary_frequencies`, perhaps scaled.
  """
  return position[..., None].astype(jnp.float32) * frequency


def linear_scaling(
  frequency: Float[Array, " half"], *, factor: float
) -> Float[Array, " half"]:
  """Position interpolation (arXiv 2306.15595), Eq. 4: positions shrink.

  Args:
    frequency: of `rotary_frequencies`.
    factor: how much longer documents become.
  """
  return frequency / factor


def llama3_scaling(
  frequency: Float[Array, " half"],
  *,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_max_position: int,
) -> Float[Array, " half"]:
  """Llama 3.1's scaling: slow frequencies shrink, fast ones stay.

  Source: the NTK-by-parts interpolation of YaRN (arXiv 2309.00071), §3.2, by the
  number of turns that a frequency makes within the original context: below
  `low_freq_factor` it is divided by `factor`, above `high_freq_factor` it stays,
  between them both are mixed linearly in the number of turns.

  Args:
    frequency: of `rotary_frequencies`.
    factor: how much longer documents become.
    low_freq_factor: turns below which a frequency is divided.
    high_freq_factor: turns above which it stays, more than those.
    original_max_position: positions that the model was first trained on.
  """
  turns = original_max_position * frequency / (2 * math.pi)
  kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
  kept = jnp.clip(kept, 0.0, 1.0)
  return frequency * (kept + (1 - kept) / factor)


def yarn_scaling(
  frequency: Float[Array, " half"],
  *,
  base: float,
  factor: float,
  beta_fast: float,
  beta_slow: float,
  original_max_position: int,
  truncate: bool,
) -> Float[Array, " half"]:
  """YaRN (arXiv 2309.00071), §3.2, with the ramp of its published weights.

  The paper's ramp is linear in the number of turns; the models that were
  published with this scaling have it linear in the feature's index, between the
  indices that make `beta_fast` and `beta_slow` turns, and so has this function.

  Args:
    frequency: of `rotary_frequencies`.
    base: of `rotary_frequencies`.
    factor: how much longer documents become.
    beta_fast: turns within the original context above which a frequency stays.
    beta_slow: turns below which it is divided by `factor`.
    original_max_position: positions that the model was first trained on.
    truncate: whether the two indices are rounded away from each other.
  """
  half = frequency.shape[-1]

  def index(turns: float) -> float:
    turn = 2 * math.pi * turns
    return half * math.log(original_max_position / turn) / math.log(base)

  first, last = index(beta_fast), index(beta_slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, 2 * half - 1)
  if first == last:
    last = first + 1e-3  # a step
  ramp = (jnp.arange(half, dtype=jnp.float32) - first) / (last - first)
  shrunk = jnp.clip(ramp, 0.0, 1.0)
  return frequency * (1 - shrunk) + frequency / factor * shrunk


def yarn_magnitude(factor: float) -> float:
  """What YaRN multiplies cosine and sine by (arXiv 2309.00071), §3.4, Eq. 15.

  Args:
    factor: how much longer documents become.
  """
  return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(
  x: Float[Array, "B L H D"],
  cos: Float[Array, "B L half"],
  sin: Float[Array, "B L half"],
) -> Float[Array, "B L H D"]:
  """Rotates each pair (i, i + D/2) by its angle; float32 inside.

  Args:
    x: queries or keys.
    cos: cosine of `rotary_angles`; of no frequency, nothing is rotated.
    sin: sine of `rotary_angles`.
  """
  if not cos.shape[-1]:
    return x
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
