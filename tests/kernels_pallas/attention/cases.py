"""Calls of attention that every implementation is held to, and how to run one."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention

# What lets an implementation for other hardware run here.
HERE = {
  "tokamax": {"backends": ("xla_chunked",)},
  "cudnn": {"backend": "xla"},
  "splash": {"interpret": True},
}


def implementation(name: str) -> Callable[..., jax.Array]:
  """`attention` by that implementation, past the gate where it would refuse."""
  if name not in HERE:
    return functools.partial(attention, implementation=name)
  if name == "tokamax":
    pytest.importorskip(
      "tokamax", reason="the extra `kernels` is not installed"
    )
  module = importlib.import_module(f"kernels_pallas.attention.{name}")

  def call(q, k, v, k_start, k_end, *, causal=True, documents=False):
    del documents
    promises = {"causal": causal} if name == "tokamax" else {}
    scale = q.shape[-1] ** -0.5
    return module.attention(
      q, k, v, k_start, k_end, scale=scale, **promises, **HERE[name]
    )

  return call


def arrays(queries: int, keys: int, heads: int, groups: int, seed: int = 0):
  """Queries, keys and values of two rows."""
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32)
    for n, h in ((queries, heads), (keys, groups), (keys, groups))
  )


def intervals(length: int, keys: int, causal: bool, seed: int = 0):
  """Any intervals; the last two queries of the second row see nothing."""
  rng = np.random.default_rng(seed)
  if causal:
    end = np.broadcast_to(np.arange(1, length + 1), (2, length))
    start = end - 1 - rng.integers(0, length, end.shape).clip(max=end - 1)
  else:
    start = rng.integers(0, keys, (2, length))
    end = start + rng.integers(0, keys, start.shape)
  start, end = start.copy(), end.copy().clip(max=keys)
  start[1, -2:] = end[1, -2:] = 0
  return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def documents(*rows: tuple[int, ...]):
  """Intervals of packed documents, by their lengths; negative is padding."""
  start, end = [], []
  for lengths in rows:
    position = np.arange(sum(map(abs, lengths)))
    sizes = np.abs(lengths)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    sees = np.repeat(lengths, sizes) > 0
    # Any empty interval is padding, not only [0, 0).
    start.append(np.where(sees, first, position))
    end.append(np.where(sees, position + 1, position))
  return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def run(call: Callable[..., jax.Array], **options: Any):
  """Compiles a call: of a case, the output and the gradients of q, k and v."""

  def loss(q, k, v, start, end):
    out = call(q, k, v, start, end, **options)
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    return (out * weights).sum(), out

  compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

  def output_and_gradients(q, k, v, start, end):
    (_, out), grads = compiled(q, k, v, start, end)
    return out, grads

  return output_and_gradients
