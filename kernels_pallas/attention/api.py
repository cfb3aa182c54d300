"""The gate of attention: implementations by name, the choice logged once."""

import contextlib
import contextvars
import difflib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jaxtyping import Array, Float, Int

from kernels_pallas.platform import target_platform

# Name -> what it is told of the call's promises.
_PROMISES = {
  "reference": (),
  "xla_blockwise": ("causal",),
  "tokamax": ("causal",),
  "cudnn": (),
  "splash": (),
}
IMPLEMENTATIONS = tuple(_PROMISES)
# What "auto" tries, per platform, before `xla_blockwise`, which takes any call.
_FASTER = {"gpu": ("tokamax", "cudnn"), "tpu": ("splash",)}

_RECORD: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
  "_RECORD", default=None
)


class RefusedError(ValueError):
  """An implementation that was asked for by name cannot do the call."""


def attention(
  q: Float[Array, "B Q H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  k_start: Int[Array, "B Q"],
  k_end: Int[Array, "B Q"],
  *,
  causal: bool = True,
  documents: bool = False,
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
    documents: promises more: the intervals are whole causal documents. Query i
      sees from its document's first position up to itself, or nothing at all
      (padding). An implementation that relies on it gives NaN where it is
      broken.
    scale: multiplies the scores; default D^(−1/2).
    implementation: a name of `IMPLEMENTATIONS`, or "auto": the platform's first
      that can do the call. A name never falls back to another.

  Raises:
    RefusedError: a named implementation that cannot do this call, with the
      reason.
    ValueError: an unknown implementation, empty arrays, heads that do not group,
      `causal` with Q != S, or `documents` without `causal`.
  """
  _check(q, k, causal, documents, implementation)
  promises = {"causal": causal, "documents": documents}
  if implementation == "auto":
    implementation = _choose(q, k, v, promises)
  elif reason := _refusal(implementation, q, k, v, promises):
    raise RefusedError(
      f"attention implementation {implementation!r} cannot do this call:"
      f" {reason}"
    )
  options = {name: promises[name] for name in _PROMISES[implementation]}
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  return _module(implementation).attention(
    q, k, v, k_start, k_end, scale=factor, **options
  )


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[str]]:
  """Collects what "auto" chooses in programs that are traced meanwhile.

  Yields:
    The lines that are logged, each once: the name, the platform, and why faster
    ones refused.
  """
  record: list[str] = []
  token = _RECORD.set(record)
  try:
    yield record
  finally:
    _RECORD.reset(token)


def _check(
  q: jax.Array,
  k: jax.Array,
  causal: bool,
  documents: bool,
  implementation: str,
) -> None:
  allowed = ("auto", *IMPLEMENTATIONS)
  if implementation not in allowed:
    close = difflib.get_close_matches(implementation, allowed, n=1)
    raise ValueError(
      f"attention implementation {implementation!r} is unknown; allowed:"
      f" {', '.join(allowed)}"
      + "".join(f"; did you mean {name!r}?" for name in close)
    )
  if 0 in (*q.shape, *k.shape):
    raise ValueError(
      f"attention of an empty array: queries {q.shape}, keys {k.shape}"
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
  if documents and not causal:
    raise ValueError(
      "documents=True promises causal intervals: pass causal=True, or"
      " documents=False"
    )


def _module(implementation: str) -> Any:
  # Only now: tokamax and Pallas are slow to import and may be missing.
  return importlib.import_module(f"{__package__}.{implementation}")


def _refusal(
  implementation: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  promises: dict[str, bool],
) -> str | None:
  # The reference and xla_blockwise take any call.
  refuse = getattr(_module(implementation), "refusal", None)
  return refuse and refuse(q, k, v, **promises)


def _choose(
  q: jax.Array, k: jax.Array, v: jax.Array, promises: dict[str, bool]
) -> str:
  platform = target_platform()
  choice, refused = "xla_blockwise", ""
  for name in _FASTER.get(platform, ()):
    reason = _refusal(name, q, k, v, promises)
    if reason is None:
      choice = name
      break
    refused += f"; {name} refused: {reason}"
  # On an accelerator that is a slow path: nobody is to find it by a profile.
  slow = choice == "xla_blockwise" and platform in _FASTER
  line = f"attention: {choice} on {platform}{refused}"
  _log_choice(logging.WARNING if slow else logging.INFO, line)
  record = _RECORD.get()
  if record is not None and line not in record:
    record.append(line)
  return choice


@functools.cache
def _log_choice(level: int, line: str) -> None:
  logging.log(level, "%s", line)
