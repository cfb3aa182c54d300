"""Every implementation of attention equals the reference.

Those for GPU and TPU run here by their plain substitutes (`cases.HERE`): what the
gate does around the kernel is tested in full, the kernel itself only for splash.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention, intervals
from kernels_pallas.attention.api import IMPLEMENTATIONS
from tests.kernels_pallas.attention import cases

OTHERS = [name for name in IMPLEMENTATIONS if name != "reference"]


@functools.cache
def _any_case(queries, keys, heads, groups, causal):
  case = (
    *cases.arrays(queries, keys, heads, groups),
    *cases.intervals(queries, keys, causal),
  )
  reference = cases.run(cases.implementation("reference"), causal=causal)
  return case, reference(*case)


@functools.cache
def _documents_case(rows, heads, groups):
  start, end = cases.documents(*rows)
  length = start.shape[1]
  case = (*cases.arrays(length, length, heads, groups), start, end)
  return case, cases.run(cases.implementation("reference"))(*case)


def _assert_close(got, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    got,
    expected,
  )


@pytest.mark.parametrize("name", [n for n in OTHERS if n != "splash"])
@pytest.mark.parametrize(
  ("queries", "keys", "heads", "groups", "causal"),
  [
    (1, 1, 4, 2, True),
    (37, 37, 4, 2, True),
    (128, 128, 4, 2, True),
    (300, 300, 4, 2, True),
    (150, 150, 4, 2, False),
    (40, 290, 4, 2, False),
    (130, 130, 6, 6, True),
    (130, 130, 6, 1, True),
  ],
)
def test_equals_the_reference(name, queries, keys, heads, groups, causal):
  """Outputs and gradients, any length, intervals and grouping."""
  case, expected = _any_case(queries, keys, heads, groups, causal)
  got = cases.run(cases.implementation(name), causal=causal)(*case)
  _assert_close(got, expected)


def test_blockwise_equals_the_reference_on_a_long_row():
  """Segments of several blocks, and the larger blocks of long rows."""
  case, expected = _any_case(2100, 2100, 2, 1, True)
  run = cases.run(cases.implementation("xla_blockwise"))
  _assert_close(run(*case), expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
  ("rows", "heads", "groups"),
  [
    (((1,), (-1,)), 2, 2),
    (((1, 20, 7, 9), (-3, 20, -5, 6, -3)), 4, 2),
    # Two blocks of splash: documents that begin, end and go on in the second.
    (((384, 216), (100, -40, 300, 160)), 2, 1),
  ],
)
def test_equals_the_reference_on_documents(name, rows, heads, groups):
  """Packed whole documents, with padding anywhere."""
  case, expected = _documents_case(rows, heads, groups)
  got = cases.run(cases.implementation(name), documents=True)(*case)
  _assert_close(got, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_packed_documents_never_see_each_other(name):
  """What one document holds reaches no output and no gradient of another."""
  start, end = cases.documents((70, 90), (70, 90))
  q, k, v = cases.arrays(160, 160, 2, 1)
  call = cases.implementation(name)

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def second(q, k, v):
    out = call(q, k, v, start, end, documents=True)
    return out[:, 70:].sum(), out

  second = jax.jit(second)
  (_, clean), grads = second(q, k, v)
  (_, other), _ = second(q, k.at[:, :70].add(1e3), v.at[:, :70].set(1e6))
  np.testing.assert_array_equal(clean[:, 70:], other[:, 70:])
  assert (np.abs(clean - other)[:, :70] > 1).any()
  for grad in grads:
    assert not np.asarray(grad[:, :70]).any()
    assert np.asarray(grad[:, 70:]).any()


@pytest.mark.smoke
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_zero(name):
  """Padding is 0, never NaN, and no gradient knows what it held."""
  start, end = cases.documents((20,), (13, -2, 5))
  q, k, v = cases.arrays(20, 20, 4, 2)
  run = cases.run(cases.implementation(name), documents=True)
  out, grads = run(q, k, v, start, end)
  wild = run(q.at[1, 13:15].mul(1e3), k, v, start, end)
  assert np.isfinite(out).all()
  assert not np.asarray(out[1, 13:15]).any()
  assert not np.asarray(grads[0][1, 13:15]).any()
  assert all(np.isfinite(g).all() for g in grads)
  jax.tree.map(np.testing.assert_array_equal, wild, (out, grads))


@pytest.mark.parametrize("name", OTHERS)
def test_bfloat16_stays_bfloat16_and_close(name):
  """Outputs and gradients have the arguments' dtype, and float32's values."""
  start, end = cases.documents((20,), (13, -2, 5))
  case = cases.arrays(20, 20, 4, 2)
  expected = cases.run(cases.implementation("reference"))(*case, start, end)
  half = [x.astype(jnp.bfloat16) for x in case]
  run = cases.run(cases.implementation(name), documents=True)
  got = run(*half, start, end)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.1)


def test_broken_documents_are_nan_in_splash():
  """Intervals that are no whole causal documents poison their row, loudly."""
  good = cases.documents((8, 12))
  position = jnp.arange(20)
  start, end = (jnp.tile(x, (7, 1)) for x in good)
  # A window; a later key; a document from before the row; one that begins amid
  # another; one that goes on after padding; one that goes on after another.
  start = start.at[1].max(position - 3)
  end = end.at[2, 4].add(1)
  start = start.at[3, :8].set(-1)
  start = start.at[4, 4:8].set(2)
  end = end.at[5, 10].set(0)
  start = start.at[6, 15:].set(0)
  q, k, v = (jnp.tile(x[:1], (7, 1, 1, 1)) for x in cases.arrays(20, 20, 2, 1))
  run = cases.run(cases.implementation("splash"), documents=True)
  out, grads = run(q, k, v, start, end)
  assert np.isfinite(out[0]).all()
  assert all(np.isfinite(g[0]).all() for g in grads)
  for row in range(1, 7):
    assert np.isnan(out[row]).all(), row
    assert all(np.isnan(g[row]).any() for g in grads), row


def test_kernels_get_no_empty_interval_and_none_past_the_keys():
  """What lies outside the keys may be a kernel's own padding."""
  start, end = (
    jnp.asarray([row], jnp.int32)
    for row in ([2, -3, 4, 5, 9, -4], [5, 2, 99, 5, 12, 0])
  )
  sees, start, end = intervals.fill_empty(start, end, 8)
  assert sees.tolist() == [[True, True, True, False, False, False]]
  assert start.tolist() == [[2, 0, 4, 0, 0, 0]]
  assert end.tolist() == [[5, 2, 8, 1, 1, 1]]


def test_blockwise_memory_grows_with_length_only():
  """Compiled temporaries at 4x the length are about 4x, not 16x."""
  sizes = []
  for length in (1024, 4096):
    shapes = [
      jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32)
      for heads in (2, 2, 2)
    ]
    interval = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def f(q, k, v, start, end):
      return attention(
        q, k, v, start, end, implementation="xla_blockwise"
      ).sum()

    compiled = (
      jax.jit(jax.grad(f, argnums=(0, 1, 2)))
      .lower(*shapes, interval, interval)
      .compile()
    )
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 6 * sizes[0]
