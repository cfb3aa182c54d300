"""The gate of attention: implementations by name, the choice logged once."""

import functools

import jax
from absl import logging
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import reference, xla_blockwise

IMPLEMENTATIONS = ("reference", "xla_blockwise")


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  causal: bool = True,
  scale: float | None = None,
  implementation: str = "auto",
) -> Float[Array, "B Q H D"]:
  """Attention in which each query sees one interval of keys.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys; S may differ from Q where `causal` is False.
    v: values.
    k_start: first key that a query sees, in sequence order.
    k_end: one past the last; an empty interval gives 0.
    causal: promises that query i sees no key after i (intervals narrow it
      further), so implementations may skip those keys unseen.
    scale: multiplies the scores; default D^(−1/2).
    implementation: a name of `IMPLEMENTATIONS`, or "auto". A name never falls
      back to another.

  Raises:
    ValueError: an unknown implementation, heads that do not group, or `causal`
      with Q != S.
  """
  if implementation not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(
      f"attention implementation {implementation!r} is unknown; allowed: auto,"
      f" {', '.join(IMPLEMENTATIONS)}"
    )
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f"{q.shape[2]} query heads cannot share {k.shape[2]} key-value heads"
    )
  if causal and q.shape[1] != k.shape[1]:
    raise ValueError(
      f"causal attention of {q.shape[1]} queries to {k.shape[1]} keys: pass"
      f" causal=False and intervals"
    )
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation == "auto":
    implementation = "xla_blockwise"
    _log_choice(implementation, jax.default_backend())
  if implementation == "reference":
    return reference.attention(q, k, v, k_start, k_end, scale=factor)
  return xla_blockwise.attention(
    q, k, v, k_start, k_end, scale=factor, causal=causal
  )


@functools.cache
def _log_choice(implementation: str, backend: str) -> None:
  logging.info(
    "attention: %s on %s (the only implementation for any interval and length"
    " without L² memory)",
    implementation,
    backend,
  )
