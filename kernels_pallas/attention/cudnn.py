"""Attention by cuDNN through jax.nn, with a boolean mask of the intervals.

cuDNN's own packing of documents is reached only by a private function of jax, and
has leaked between documents elsewhere; a mask is plain, but holds B·Q·S values, as
a bias of the queries' dtype.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import intervals, limits

_MAX_WIDTH = 128
_DTYPES = ("float16", "bfloat16")


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  scale: float,
  backend: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B Q H D"]:
  """As `reference.attention`; any intervals.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys.
    v: values.
    k_start: first key that a query sees.
    k_end: one past the last.
    scale: usually D^(−1/2).
    backend: of `jax.nn.dot_product_attention`; "xla" runs everywhere.
  """
  queries, keys = q.shape[1], k.shape[1]
  # With a mask and a gradient cuDNN takes even lengths only.
  pad = functools.partial(intervals.pad_length, multiple=2)
  sees, start, end = intervals.fill_empty(pad(k_start), pad(k_end), keys)
  q, k, v = pad(q), pad(k), pad(v)
  key = jnp.arange(k.shape[1], dtype=start.dtype)
  mask = (key >= start[:, :, None]) & (key < end[:, :, None])
  out = jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], scale=scale, implementation=backend
  )
  return intervals.blank(out, sees)[:, :queries]


def refusal(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  *,
  causal: bool,
  documents: bool,
) -> str | None:
  """Why cuDNN cannot do this call; None if it can.

  Args:
    q: queries.
    k: keys.
    v: values.
    causal: as in `attention`.
    documents: as in `attention`.
  """
  del causal, documents
  width = q.shape[-1]
  if reason := limits.platform("gpu") or limits.dtypes(_DTYPES, q, k, v):
    return reason
  if width % 8 or width > _MAX_WIDTH:
    return f"head width {width} (it takes multiples of 8 up to {_MAX_WIDTH})"
  return (
    limits.mask(k.shape[1])
    or _old_gpu()
    or _reason(tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)))
  )


def _old_gpu() -> str | None:
  """Says that the GPU at hand is too old, where there is one."""
  if jax.default_backend() != "gpu":
    return None
  device = jax.local_devices()[0]
  capability = str(getattr(device, "compute_capability", ""))
  major = capability.partition(".")[0]
  if major.isdigit() and int(major) < 8:
    return f"compute capability {capability} (it takes 8.0 and later)"
  return None


@functools.cache
def _reason(shapes) -> str | None:
  interval = jax.ShapeDtypeStruct(shapes[0].shape[:2], "int32")
  call = functools.partial(attention, scale=1.0)
  return limits.trial(call, *shapes, interval, interval)
