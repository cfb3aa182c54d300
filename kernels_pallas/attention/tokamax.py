"""Attention by tokamax's flash attention, which takes an interval per query.

tokamax's public function has no argument for intervals, so this calls the
operations beneath it. What another version of tokamax lacks of them becomes the
reason of a refusal.
"""

import functools
import importlib.util

import jax
from absl import flags
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import intervals, limits

# Mosaic GPU is Hopper's and Blackwell's; Triton also runs on Ampere, but its
# backward pass builds a B·Q·S mask.
_BACKENDS = ("mosaic_gpu", "triton")
# With intervals Hopper's kernel wants a multiple of 128 queries, Blackwell's is
# tested by its authors at multiples of 256.
_LENGTH = 256


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  scale: float,
  causal: bool,
  backends: tuple[str, ...] = _BACKENDS,
) -> Float[Array, "B Q H D"]:
  """As `reference.attention`; any length and any intervals.

  Args:
    q: queries; H is a multiple of G (grouped-query attention).
    k: keys.
    v: values.
    k_start: first key that a query sees.
    k_end: one past the last.
    scale: usually D^(−1/2).
    causal: promises that query i sees no key after i, for Q == S.
    backends: tokamax's names; the first that can do the call does it.

  Raises:
    NotImplementedError: none of them can.
  """
  reasons = _reasons(backends, q, k, v, causal)
  able = [name for name, reason in reasons.items() if reason is None]
  if not able:
    raise NotImplementedError(_join(reasons))
  return _call(able[0], causal, scale, q, k, v, k_start, k_end)


def refusal(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  *,
  causal: bool,
  documents: bool,
) -> str | None:
  """Why tokamax cannot do this call; None if it can.

  Args:
    q: queries.
    k: keys.
    v: values.
    causal: as in `attention`.
    documents: as in `attention`.
  """
  del documents
  if importlib.util.find_spec("tokamax") is None:
    return "not installed (pip install 'fusionlab[kernels]')"
  if reason := limits.platform("gpu") or limits.mesh():
    return reason
  if jax.default_backend() != "gpu":
    return "it chooses its kernel by the GPU at hand, and there is none"
  reasons = _reasons(_BACKENDS, q, k, v, causal)
  return _join(reasons) if all(reasons.values()) else None


def _join(reasons: dict[str, str | None]) -> str:
  return ", ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _reasons(backends, q, k, v, causal) -> dict[str, str | None]:
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
  return {name: _reason(name, causal, shapes) for name in backends}


@functools.cache
def _reason(name: str, causal: bool, shapes) -> str | None:
  if name == "triton" and (reason := limits.mask(shapes[1].shape[1])):
    return reason
  interval = jax.ShapeDtypeStruct(shapes[0].shape[:2], "int32")
  call = functools.partial(_call, name, causal, 1.0)
  return limits.trial(call, *shapes, interval, interval)


def _call(name, causal, scale, q, k, v, k_start, k_end):
  from tokamax._src.ops.attention import api, base  # pyright: ignore

  # tokamax's options are absl flags, read from sys.argv where no program has
  # parsed them: the arguments of another program would be an error.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  queries, keys = q.shape[1], k.shape[1]
  pad = functools.partial(intervals.pad_length, multiple=_LENGTH)
  sees, start, end = intervals.fill_empty(pad(k_start), pad(k_end), keys)
  mask = base.Mask(k_start=start[:, None], k_end=end[:, None], is_causal=causal)
  out = api.IMPLEMENTATIONS[name](
    pad(q), pad(k), pad(v), mask=mask, logits_scale=scale
  )
  return intervals.blank(out, sees)[:, :queries]
