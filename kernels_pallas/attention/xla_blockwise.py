"""Attention by blocks of queries in plain XLA, with a backward pass of its own.

Query blocks are unrolled; with `causal` each meets the keys up to its own end
only, so half of the scores are never computed. The backward pass recomputes a
block's weights from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691,
Algorithm 2), so memory grows with L, not L².
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30
_MIN_BLOCK = 128
_MAX_BLOCKS = 32


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


def _blocks(causal: bool, queries: int, keys: int):
  """(start, stop, keys in reach) of each block of queries."""
  size = max(_MIN_BLOCK, -(-queries // _MAX_BLOCKS))
  for start in range(0, queries, size):
    stop = min(start + size, queries)
    yield start, stop, stop if causal else keys


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
  outs, lses = [], []
  for start, stop, reach in _blocks(causal, q.shape[3], k.shape[2]):
    at = slice(start, stop)
    scores = _scores(
      q[..., at, :], k[:, :, :reach], k_start[..., at, :], k_end[..., at, :]
    )
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    # A query that sees nothing has all scores at the mask: its output is 0.
    inverse = jnp.where(top > _MASKED / 2, 1.0 / total, 0.0)
    out = jnp.einsum(
      "BGRqs,BGsD->BGRqD", weights.astype(v.dtype), v[:, :, :reach],
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    outs.append((out * inverse).astype(q.dtype))
    # +inf makes the recomputed weights of an unseeing query exactly 0.
    lses.append(jnp.where(top > _MASKED / 2, top + jnp.log(total), jnp.inf))
  out, lse = jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)
  return out, (q, k, v, k_start, k_end, out, lse)


def _backward(causal, residuals, g):
  q, k, v, k_start, k_end, out, lse = residuals
  delta = jnp.sum(
    g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
  )
  dk = jnp.zeros(k.shape, jnp.float32)
  dv = jnp.zeros(v.shape, jnp.float32)
  dqs = []
  for start, stop, reach in _blocks(causal, q.shape[3], k.shape[2]):
    at = slice(start, stop)
    qb, gb, kb = q[..., at, :], g[..., at, :], k[:, :, :reach]
    scores = _scores(qb, kb, k_start[..., at, :], k_end[..., at, :])
    weights = jnp.exp(scores - lse[..., at, :])
    dw = jnp.einsum(
      "BGRqD,BGsD->BGRqs", gb, v[:, :, :reach],
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    ds = (weights * (dw - delta[..., at, :])).astype(q.dtype)
    dqs.append(
      jnp.einsum("BGRqs,BGsD->BGRqD", ds, kb, preferred_element_type=q.dtype)
    )
    # Adding to the first `reach` keys by padding: XLA's static-slice update of
    # an accumulator would be a scatter in the step.
    rest = ((0, 0), (0, 0), (0, k.shape[2] - reach), (0, 0))
    dk += jnp.pad(
      jnp.einsum(
        "BGRqs,BGRqD->BGsD", ds, qb, preferred_element_type=jnp.float32
      ),
      rest,
    )
    dv += jnp.pad(
      jnp.einsum(
        "BGRqs,BGRqD->BGsD", weights.astype(g.dtype), gb,
        preferred_element_type=jnp.float32,
      ),
      rest,
    )  # fmt: skip
  dq = jnp.concatenate(dqs, 3)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
