"""Attention by blocks of queries in plain XLA, with a backward pass of its own.

With `causal` the queries are cut into segments, unrolled, that meet the keys up to
their own end only, so nearly half of the scores are never computed; a segment scans
over its blocks. The backward pass recomputes a block's weights from the saved
log-sum-exp (FlashAttention-2, arXiv 2307.08691, Algorithm 2), so memory grows with
L, not L².
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30
# A block's scores grow with its queries, and so does memory; 8 segments compute
# up to an eighth more scores than a long causal row needs.
_MAX_BLOCK = 128
_MAX_SEGMENTS = 8


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  scale: float,
  causal: bool,
) -> Float[Array, "B Q H D"]:
  """As `reference.attention`; any length.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys.
    v: values.
    k_start: first key that a query sees.
    k_end: one past the last.
    scale: usually D^(−1/2).
    causal: promises that query i sees no key after i, for Q == S.
  """
  rows, queries, heads, width = q.shape
  groups = k.shape[2]
  # [B, G, R, Q, D] and [B, G, S, D]: matmul axes last, so that no transpose
  # is left inside a block.
  q = q.reshape(rows, queries, groups, heads // groups, width)
  q = q.transpose(0, 2, 3, 1, 4) * jnp.asarray(scale, q.dtype)
  out: jax.Array = _attend(
    causal,
    q,
    k.transpose(0, 2, 1, 3),
    v.transpose(0, 2, 1, 3),
    k_start[:, None, None, :, None],
    k_end[:, None, None, :, None],
  )
  return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, width)


def _cut(causal: bool, queries: int, keys: int):
  """Cuts the queries: (block size, padding, segments of (start, stop, reach)).

  Blocks of one segment run one after another and share the keys in reach.
  """
  blocks = -(-queries // _MAX_BLOCK)
  size = -(-queries // blocks)
  step = -(-blocks // _MAX_SEGMENTS) * size if causal else blocks * size
  padded = blocks * size
  segments = [
    (start, min(start + step, padded), min(start + step, keys))
    if causal
    else (start, padded, keys)
    for start in range(0, padded, step)
  ]
  return size, padded - queries, segments


def _split(x, start: int, stop: int, size: int):
  """[B, G, R, Q, f] to its blocks between two positions, [n, B, G, R, q, f]."""
  x = x[..., start:stop, :]
  x = x.reshape(*x.shape[:3], (stop - start) // size, size, x.shape[-1])
  return jnp.moveaxis(x, 3, 0)


def _join(blocks):
  """Inverse of `_split` for all segments."""
  x = jnp.moveaxis(jnp.concatenate(blocks), 0, 3)
  return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _pad(x, padding: int):
  """Adds queries at the end; zeros are intervals that see nothing."""
  return jnp.pad(x, ((0, 0),) * 3 + ((0, padding), (0, 0)))


def _scores(q, k, k_start, k_end):
  """Masked scores [B, G, R, q, s] of one block, float32."""
  scores = jnp.einsum(
    "BGRqD,BGsD->BGRqs", q, k, preferred_element_type=jnp.float32
  )
  key = jnp.arange(k.shape[2], dtype=k_start.dtype)
  return jnp.where((key >= k_start) & (key < k_end), scores, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, q, k, v, k_start, k_end):
  return _forward(causal, q, k, v, k_start, k_end)[0]


def _forward(causal, q, k, v, k_start, k_end):
  queries = q.shape[3]
  size, padding, segments = _cut(causal, queries, k.shape[2])
  padded = [_pad(x, padding) for x in (q, k_start, k_end)]
  outs, lses = [], []
  for start, stop, reach in segments:
    keys, values = k[:, :, :reach], v[:, :, :reach]

    def block(_, x, keys=keys, values=values):
      scores = _scores(x[0], keys, *x[1:])
      top = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = weights.sum(-1, keepdims=True)
      out = jnp.einsum(
        "BGRqs,BGsD->BGRqD", weights.astype(v.dtype), values,
        preferred_element_type=jnp.float32,
      )  # fmt: skip
      # A query that sees nothing has all scores at the mask. Its output is 0,
      # and +inf makes its recomputed weights exactly 0.
      sees = top > _MASKED / 2
      out = (out * jnp.where(sees, 1.0 / total, 0.0)).astype(q.dtype)
      return None, (out, jnp.where(sees, top + jnp.log(total), jnp.inf))

    xs = [_split(x, start, stop, size) for x in padded]
    out, lse = jax.lax.scan(block, None, xs)[1]
    outs.append(out)
    lses.append(lse)
  out = _join(outs)[..., :queries, :]
  lse = _join(lses)[..., :queries, :]
  return out, (q, k, v, k_start, k_end, out, lse)


def _backward(causal, residuals, g):
  q, k, v, k_start, k_end, out, lse = residuals
  queries = q.shape[3]
  delta = jnp.sum(
    g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
  )
  size, padding, segments = _cut(causal, queries, k.shape[2])
  padded = [_pad(x, padding) for x in (q, k_start, k_end, g, lse, delta)]
  dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  dqs = []
  for start, stop, reach in segments:
    keys, values = k[:, :, :reach], v[:, :, :reach]

    def block(sums, x, keys=keys, values=values):
      qb, starts, ends, gb, lse, delta = x
      weights = jnp.exp(_scores(qb, keys, starts, ends) - lse)
      dw = jnp.einsum(
        "BGRqD,BGsD->BGRqs", gb, values, preferred_element_type=jnp.float32
      )
      ds = (weights * (dw - delta)).astype(q.dtype)
      dq = jnp.einsum(
        "BGRqs,BGsD->BGRqD", ds, keys, preferred_element_type=q.dtype
      )
      dk = jnp.einsum(
        "BGRqs,BGRqD->BGsD", ds, qb, preferred_element_type=jnp.float32
      )
      dv = jnp.einsum(
        "BGRqs,BGRqD->BGsD", weights.astype(g.dtype), gb,
        preferred_element_type=jnp.float32,
      )  # fmt: skip
      return (sums[0] + dk, sums[1] + dv), dq

    zeros = (jnp.zeros(keys.shape, jnp.float32),) * 2
    xs = [_split(x, start, stop, size) for x in padded]
    sums, dq = jax.lax.scan(block, zeros, xs)
    dqs.append(dq)
    # Adding to the first `reach` keys by padding: XLA's static-slice update of
    # an accumulator would be a scatter in the step.
    rest = ((0, 0), (0, 0), (0, k.shape[2] - reach), (0, 0))
    dk += jnp.pad(sums[0], rest)
    dv += jnp.pad(sums[1], rest)
  dq = _join(dqs)[..., :queries, :]
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
