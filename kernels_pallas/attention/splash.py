"""Attention on TPU by jax's splash attention, for whole causal documents.

Splash takes a static mask and an id per position, not intervals. Where every
interval is its document's beginning up to the query, the beginning is the id.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention import intervals, limits

_LANES = 128
_MAX_BLOCK = 512
# The widest that was compiled.
_MAX_WIDTH = 512
_DTYPES = ("float32", "bfloat16")
_PADDING = -1


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  scale: float,
  interpret: bool = False,
) -> Float[Array, "B Q H D"]:
  """As `reference.attention` for whole causal documents; any length.

  A row whose intervals are anything else gives NaN: its mask would be wrong.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys, as many as queries.
    v: values.
    k_start: first position of the query's document.
    k_end: the query's position plus 1; padding has an empty interval.
    scale: usually D^(−1/2).
    interpret: runs the kernel's steps in plain jax, anywhere, slowly.
  """
  length, heads = q.shape[1:3]
  sees = k_start < k_end
  segment = jnp.where(sees, k_start, _PADDING)
  kept = _whole_documents(k_start, k_end, segment, sees)
  block, padded = _blocks(length)
  attend = _kernel(heads, padded, block, interpret)
  ids = _modules()[0].SegmentIds

  def row(q, k, v, segment):
    return attend(q, k, v, ids(segment, segment))

  def heads_first(x):
    return intervals.pad_length(x, padded).transpose(0, 2, 1, 3)

  # Scaled in float32: the kernel has no scale of its own.
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  # Zeros would be document 0.
  segment = jnp.pad(
    segment, ((0, 0), (0, padded - length)), constant_values=_PADDING
  )
  out = jax.vmap(row)(heads_first(q), heads_first(k), heads_first(v), segment)
  out = intervals.blank(out.transpose(0, 2, 1, 3)[:, :length], sees)
  # A product, not a selection: the gradients are to be NaN too.
  poison = jnp.where(kept, 1.0, jnp.nan).astype(out.dtype)
  return out * poison[:, None, None, None]


def refusal(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  *,
  causal: bool,
  documents: bool,
) -> str | None:
  """Why splash attention cannot do this call; None if it can.

  Args:
    q: queries.
    k: keys.
    v: values.
    causal: as in `attention`.
    documents: as in `attention`.
  """
  del causal
  reason = (
    limits.platform("tpu") or limits.mesh() or limits.dtypes(_DTYPES, q, k, v)
  )
  if reason:
    return reason
  if not documents:
    return "intervals that need not be whole causal documents (documents=True)"
  if q.shape[-1] > _MAX_WIDTH:
    return f"head width {q.shape[-1]} (it takes up to {_MAX_WIDTH})"
  try:
    _modules()
  except ImportError as error:
    return f"jax {jax.__version__} has none ({error})"
  return None


def _whole_documents(
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  segment: Int[Array, "B Q"],
  sees: Bool[Array, "B Q"],
) -> Bool[Array, " B"]:
  """Which rows hold nothing but whole causal documents and padding.

  It suffices to look one position back. A query either begins its document or
  continues that of the position before, which by induction leads back to
  position k_start without a gap; and no position before k_start can bear its
  id, since it would have to begin after itself.
  """
  position = jnp.arange(k_start.shape[1], dtype=k_start.dtype)
  before = jnp.pad(segment, ((0, 0), (1, 0)), constant_values=_PADDING)[:, :-1]
  ends_here = (k_start >= 0) & (k_end == position + 1)
  goes_on = (k_start == position) | (before == k_start)
  return (~sees | (ends_here & goes_on)).all(axis=1)


def _blocks(length: int) -> tuple[int, int]:
  """The block size, and the length that a whole number of blocks covers."""
  number = -(-length // _MAX_BLOCK)
  block = -(-length // (number * _LANES)) * _LANES
  return block, number * block


def _modules():
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  return splash_attention_kernel, splash_attention_mask


@functools.cache
def _kernel(heads: int, length: int, block: int, interpret: bool):
  # Splash makes its tables with jnp and keeps them: as tracers of the first
  # trace they would be of no use to the second, so they become numpy's. A new
  # thread is in no trace; `ensure_compile_time_eval` makes tracers all the same
  # where a shard_map is being differentiated (jax 0.10).
  with concurrent.futures.ThreadPoolExecutor(1) as fresh:
    return fresh.submit(_made, heads, length, block, interpret).result()


def _made(heads: int, length: int, block: int, interpret: bool):
  kernel, masks = _modules()
  mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
  names = ("block_q", "block_kv", "block_kv_compute")
  names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
  names += ("block_q_dq", "block_kv_dq")
  made = kernel.make_splash_mha(
    mask,
    block_sizes=kernel.BlockSizes(**dict.fromkeys(names, block)),
    # So that remat by name keeps the output and the log-sum-exps.
    residual_checkpoint_name="attention",
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  return jax.tree.map(np.asarray, made)
