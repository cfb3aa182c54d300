"""Attention by blocks of queries in plain XLA, with a backward pass of its own.

With `causal` the queries are cut into segments, unrolled, that meet the keys up to
their own end only, so nearly half of the scores are never computed; a segment scans
over its blocks. The backward pass recomputes a block's weights from the saved
log-sum-exp (FlashAttention-2, arXiv 2307.08691, Algorithm 2), so memory grows with
L, not L².

On CPU a few heads are done at a time, so that their scores stay in the cache.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.platform import target_platform

_MASKED = -1e30
# Large blocks run nearer to the peak, small ones compute fewer scores above the
# diagonal, which are few in a long row.
_LONG, _BLOCK, _LONG_BLOCK = 1024, 128, 256
# 8 segments compute up to an eighth more scores than a long causal row needs.
_MAX_SEGMENTS = 8
# Scores that one product makes on CPU: half a MiB in float32.
_SCORES_IN_CACHE = 128 * 1024


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
  rows, queries, heads, _ = q.shape
  keys, groups = k.shape[1:3]
  group = heads // groups
  size = _block_size(queries)
  plan = _Plan(
    block=size * group,
    segments=_segments(causal, size, queries, keys, group),
    heads=_heads_at_once(size * group * keys, rows * groups),
  )
  # Zeros at the end are intervals that see nothing.
  pad = ((0, 0), (0, -queries % size))
  # Scaled in float32, lest bfloat16 round the scale too.
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  q = jnp.pad(q, (*pad, (0, 0), (0, 0)))
  intervals = (
    jnp.broadcast_to(jnp.pad(x, pad)[..., None, None], (*q.shape[:3], 1))
    for x in (k_start, k_end)
  )
  out: jax.Array = _attend(
    plan,
    _fold(q, groups),
    *(_fold(x, groups) for x in (k, v)),
    *(_fold(x, groups) for x in intervals),
  )
  return _unfold(out, rows, heads)[:, :queries]


def _fold(x: jax.Array, groups: int) -> jax.Array:
  """[B, L, G·R, f] to [B·G, L·R, f], a group's queries one after another."""
  rows, length, heads, width = x.shape
  x = x.reshape(rows, length, groups, heads // groups, width)
  x = x.transpose(0, 2, 1, 3, 4)
  return x.reshape(rows * groups, -1, width)


def _unfold(x: jax.Array, rows: int, heads: int) -> jax.Array:
  """Inverse of `_fold`."""
  groups = x.shape[0] // rows
  x = x.reshape(rows, groups, -1, heads // groups, x.shape[-1])
  x = x.transpose(0, 2, 1, 3, 4)
  return x.reshape(rows, -1, heads, x.shape[-1])


class _Plan(NamedTuple):
  """How the work is cut.

  Attributes:
    block: rows of a block, a group's queries counted one by one.
    segments: (start, stop, reach): rows of the segment and keys that it meets;
      its blocks run one after another.
    heads: key-value heads of one pass, counted over the batch.
  """

  block: int
  segments: tuple[tuple[int, int, int], ...]
  heads: int


def _block_size(queries: int) -> int:
  """Queries of a block: equal blocks, with the least padding at the end."""
  most = _LONG_BLOCK if queries > _LONG else _BLOCK
  return -(-queries // -(-queries // most))


def _segments(causal: bool, size: int, queries: int, keys: int, group: int):
  queries += -queries % size
  step = -(-queries // (_MAX_SEGMENTS * size)) * size if causal else queries
  stops = [min(start + step, queries) for start in range(0, queries, step)]
  return tuple(
    (start * group, stop * group, min(stop, keys) if causal else keys)
    for start, stop in itertools.pairwise((0, *stops))
  )


def _heads_at_once(scores: int, heads: int) -> int:
  """Heads of a pass, of which one makes so many scores in a product.

  Accelerators want the whole batch in one product. A CPU's caches hold the
  scores of a few heads, and memory that is used again is not faulted in again.
  """
  if target_platform() != "cpu":
    return heads
  most = max(1, _SCORES_IN_CACHE // scores)
  return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


def _blocks(x: jax.Array, start: int, stop: int, size: int) -> jax.Array:
  """[N, Q, f] to its blocks between two positions, [n, N, q, f]."""
  x = x[:, start:stop]
  x = x.reshape(x.shape[0], (stop - start) // size, size, x.shape[-1])
  return jnp.moveaxis(x, 1, 0)


def _columns(x: jax.Array, start: int, stop: int, size: int) -> jax.Array:
  """[N, D, Q] to its blocks between two positions, [n, N, D, q]."""
  x = x[:, :, start:stop]
  x = x.reshape(*x.shape[:2], (stop - start) // size, size)
  return jnp.moveaxis(x, 2, 0)


def _join(blocks: Sequence[jax.Array]) -> jax.Array:
  """Inverse of `_blocks` for all segments."""
  x = jnp.moveaxis(jnp.concatenate(blocks), 0, 1)
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _scan(block: Callable, carry, xs):
  """A scan, or the body alone: XLA:CPU runs unrolled segments side by side."""
  if xs[0].shape[0] > 1:
    return jax.lax.scan(block, carry, xs)
  carry, ys = block(carry, [x[0] for x in xs])
  return carry, jax.tree.map(lambda y: y[None], ys)


# Products of matrices [N, rows, columns] in forms that XLA takes as they are: with
# more axes it would first transpose an operand. The last is the sum over queries
# that XLA:CPU does three times as fast as [q, s] by [q, D].
_by_keys = functools.partial(
  jnp.einsum, "NqD,NsD->Nqs", preferred_element_type=jnp.float32
)
_by_weights = functools.partial(jnp.einsum, "Nqs,NsD->NqD")
_over_queries = functools.partial(
  jnp.einsum, "NDq,Nqs->NDs", preferred_element_type=jnp.float32
)


def _scores(q, k, k_start, k_end):
  """Masked scores [N, q, s] of one block, float32."""
  key = jnp.arange(k.shape[1], dtype=k_start.dtype)
  seen = (key >= k_start) & (key < k_end)
  return jnp.where(seen, _by_keys(q, k), _MASKED)


def _forward_pass(plan, q, k, v, k_start, k_end):
  """Outputs [N, Q, D] and log-sum-exps [N, Q, 1]."""
  outs, lses = [], []
  for start, stop, reach in plan.segments:
    keys, values = k[:, :reach], v[:, :reach]

    def block(_, x, keys=keys, values=values):
      scores = _scores(x[0], keys, *x[1:])
      top = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = weights.sum(-1, keepdims=True)
      out = _by_weights(
        weights.astype(v.dtype), values, preferred_element_type=jnp.float32
      )
      # A query that sees nothing has all scores at the mask. Its output is 0,
      # and +inf makes its recomputed weights exactly 0.
      sees = top > _MASKED / 2
      out = (out * jnp.where(sees, 1.0 / total, 0.0)).astype(q.dtype)
      return None, (out, jnp.where(sees, top + jnp.log(total), jnp.inf))

    xs = [_blocks(x, start, stop, plan.block) for x in (q, k_start, k_end)]
    out, lse = _scan(block, None, xs)[1]
    outs.append(out)
    lses.append(lse)
  return _join(outs), _join(lses)


def _backward_pass(plan, q, k, v, g, lse, delta, k_start, k_end):
  """Gradients of q [N, Q, D], k and v [N, S, D]."""
  shape = (k.shape[0], k.shape[2], k.shape[1])
  dk, dv = (jnp.zeros(shape, jnp.float32) for _ in range(2))
  # Once for all blocks; in a block, XLA would fold it into a slow product.
  transposed = [x.transpose(0, 2, 1) for x in (q, g)]
  dqs = []
  for start, stop, reach in plan.segments:
    keys, values = k[:, :reach], v[:, :reach]

    def block(sums, x, keys=keys, values=values):
      qb, gb, lse, delta, starts, ends, qt, gt = x
      weights = jnp.exp(_scores(qb, keys, starts, ends) - lse)
      ds = (weights * (_by_keys(gb, values) - delta)).astype(q.dtype)
      dq = _by_weights(ds, keys, preferred_element_type=q.dtype)
      dk = _over_queries(qt, ds)
      dv = _over_queries(gt, weights.astype(g.dtype))
      return (sums[0] + dk, sums[1] + dv), dq

    zeros = (jnp.zeros((*shape[:2], reach), jnp.float32),) * 2
    arrays = (q, g, lse, delta, k_start, k_end)
    xs = [_blocks(x, start, stop, plan.block) for x in arrays]
    xs += [_columns(x, start, stop, plan.block) for x in transposed]
    sums, dq = _scan(block, zeros, xs)
    dqs.append(dq)
    # Adding to the first `reach` keys by padding: XLA's static-slice update of
    # an accumulator would be a scatter in the step.
    rest = ((0, 0), (0, 0), (0, k.shape[1] - reach))
    dk += jnp.pad(sums[0], rest)
    dv += jnp.pad(sums[1], rest)
  dk, dv = (x.transpose(0, 2, 1).astype(k.dtype) for x in (dk, dv))
  return _join(dqs), dk, dv


def _by_heads(f, plan: _Plan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Calls a pass on a plan's heads, one after another; arrays [N, ...]."""
  heads = arrays[0].shape[0]
  if plan.heads == heads:
    return f(plan, *arrays)
  xs = [x.reshape(-1, plan.heads, *x.shape[1:]) for x in arrays]
  _, ys = jax.lax.scan(lambda _, x: (None, f(plan, *x)), None, xs)
  return tuple(y.reshape(heads, *y.shape[2:]) for y in ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, k_start, k_end):
  return _forward(plan, q, k, v, k_start, k_end)[0]


def _forward(plan, q, k, v, k_start, k_end):
  results = _by_heads(_forward_pass, plan, q, k, v, k_start, k_end)
  out, lse = (checkpoint_name(x, "attention") for x in results)
  return out, (q, k, v, k_start, k_end, out, lse)


def _backward(plan, residuals, g):
  q, k, v, k_start, k_end, out, lse = residuals
  delta = jnp.einsum("NQD,NQD->NQ", g, out, preferred_element_type=jnp.float32)
  grads = _by_heads(
    _backward_pass, plan, q, k, v, g, lse, delta[..., None], k_start, k_end
  )
  return *grads, None, None


_attend.defvjp(_forward, _backward)
