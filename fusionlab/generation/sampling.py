"""From logits to the next id: guidance, penalties, cuts, and the draw.

Plain functions of `[B, V]` float32 logits. `Sampling` says which are on; what is
off is not in the compiled program, and values are arguments of it, so that
another temperature compiles nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fusionlab.generation.config import Sampling

_NEVER = -jnp.inf


def guide(
  conditional: Float[Array, "B *s"],
  unconditional: Float[Array, "B *s"],
  where: Bool[Array, " B"],
  weight: Float[Array, ""] | float,
) -> Float[Array, "B *s"]:
  """Classifier-free guidance: c + (w - 1) (c - u).

  Ho and Salimans 2022 (arXiv 2207.12598), Eq. 6, of predicted noise, and in
  logits, as Chameleon-like models use it; w = 1 is c to the bit.

  Args:
    conditional: c, what the document predicts.
    unconditional: u, that of the same block in a document without caption.
    where: rows that are inside of a block; the others keep c.
    weight: w.
  """
  guided = conditional + (weight - 1) * (conditional - unconditional)
  inside = jnp.expand_dims(where, tuple(range(1, conditional.ndim)))
  return jnp.where(inside, guided, conditional)


def penalise(
  logits: Float[Array, "B V"],
  occurred: Bool[Array, "B V"],
  penalty: Float[Array, ""] | float,
) -> Float[Array, "B V"]:
  """Repetition penalty (CTRL, Keskar et al. 2019, §4.1).

  Args:
    logits: positive ones are divided, negative ones multiplied.
    occurred: ids to make less likely.
    penalty: at least 1.
  """
  less = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(occurred, less, logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """Cuts all but the k likeliest ids (ties with the k-th stay)."""
  if k >= logits.shape[-1]:
    return logits
  # Not the last of the k: XLA would sort everything for a slice of them.
  least = jax.lax.top_k(logits, k)[0].min(axis=-1, keepdims=True)
  return jnp.where(logits < least, _NEVER, logits)


def keep_top_p(
  logits: Float[Array, "B V"], p: Float[Array, ""] | float
) -> Float[Array, "B V"]:
  """Nucleus sampling (Holtzman et al. 2020, Eq. 2-3).

  Keeps the smallest set of likeliest ids whose probabilities reach p; at least
  the likeliest.
  """
  order = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(order, axis=-1)
  # What stands before an id must not yet reach p.
  inside = jnp.cumsum(probability, axis=-1) - probability < p
  inside = inside.at[:, 0].set(True)
  least = jnp.where(inside, order, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(logits < least, _NEVER, logits)


def keep_min_p(
  logits: Float[Array, "B V"], p: Float[Array, ""] | float
) -> Float[Array, "B V"]:
  """Min-p sampling (Nguyen et al. 2024, arXiv 2407.01082, §3).

  Cuts ids whose probability is below p times the likeliest one's.
  """
  least = logits.max(axis=-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits < least, _NEVER, logits)


def draw(
  logits: Float[Array, "B V"],
  keys: Key[Array, " B"],
  position: Int[Array, " B"],
  sampling: Sampling,
  values: dict[str, Float[Array, ""]],
) -> Int[Array, " B"]:
  """Draws the next id of each row.

  The random number of a position depends on the row's key and the position
  alone, so a row that is cut back and goes on draws what it drew before.

  Args:
    logits: after every processor.
    keys: of the rows.
    position: where the id will stand in its row.
    sampling: says what is on (static).
    values: its numbers, see `numbers`.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / values["temperature"]
  if sampling.top_k:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    logits = keep_top_p(logits, values["top_p"])
  if sampling.min_p:
    logits = keep_min_p(logits, values["min_p"])
  keys = jax.vmap(jax.random.fold_in)(keys, position)
  drawn = jax.vmap(jax.random.categorical)(keys, logits)
  return drawn.astype(jnp.int32)


def numbers(sampling: Sampling) -> dict[str, Float[Array, ""]]:
  """The settings that a compiled program takes as arguments."""
  return {
    name: jnp.float32(getattr(sampling, name))
    for name in (
      "temperature",
      "top_p",
      "min_p",
      "repetition_penalty",
      "guidance",
    )
  }


def structure(sampling: Sampling) -> Sampling:
  """The settings with every number replaced by whether it is on.

  Two settings of equal structure share a compiled program.
  """
  return dataclasses.replace(
    sampling,
    temperature=float(sampling.temperature > 0),
    top_p=1.0 if sampling.top_p >= 1 else 0.5,
    min_p=float(sampling.min_p > 0),
    repetition_penalty=1.0 if sampling.repetition_penalty == 1 else 2.0,
    guidance=2.0 if sampling.guided else 1.0,
  )
