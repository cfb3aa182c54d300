"""Every implementation of attention equals the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention
from kernels_pallas.attention.api import IMPLEMENTATIONS


def _case(length, *, heads=4, groups=2, causal=True, seed=0, keys=None):
  rng = np.random.default_rng(seed)
  keys = keys or length
  draw = lambda n, h: jnp.asarray(  # noqa: E731
    rng.normal(size=(2, n, h, 8)), jnp.float32
  )
  q, k, v = draw(length, heads), draw(keys, groups), draw(keys, groups)
  if causal:
    end = np.broadcast_to(np.arange(1, length + 1), (2, length))
    start = end - 1 - rng.integers(0, length, end.shape).clip(max=end - 1)
  else:
    start = rng.integers(0, keys, (2, length))
    end = start + rng.integers(0, keys, start.shape)
  start, end = start.copy(), end.copy().clip(max=keys)
  # The last two queries of the second row are padding: they see nothing.
  start[1, -2:] = end[1, -2:] = 0
  return q, k, v, jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def _run(case, **options):
  q, k, v, start, end = case
  cotangent = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

  def f(q, k, v):
    out = attention(q, k, v, start, end, **options)
    return (out * cotangent).sum(), out

  (_, out), grads = jax.jit(
    jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
  )(q, k, v)
  return out, grads


@pytest.mark.parametrize(
  "implementation", [n for n in IMPLEMENTATIONS if n != "reference"]
)
@pytest.mark.parametrize(
  ("length", "options"),
  [
    (1, {}),
    (37, {}),
    (128, {}),
    (300, {}),
    (150, {"causal": False}),
    (40, {"causal": False, "keys": 290}),
    (130, {"heads": 6, "groups": 6}),
    (130, {"heads": 6, "groups": 1}),
  ],
)
def test_equals_the_reference(implementation, length, options):
  """Outputs and gradients, any length, intervals and grouping."""
  case = _case(length, **options)
  causal = options.get("causal", True)
  expected = _run(case, implementation="reference", causal=causal)
  got = _run(case, implementation=implementation, causal=causal)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    got,
    expected,
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_never_see_each_other(implementation):
  """NaN in one document reaches no output of another."""
  length = 160
  q, k, v, *_ = _case(length)
  position = np.broadcast_to(np.arange(length), (2, length))
  start = jnp.asarray(np.where(position < 70, 0, 70), jnp.int32)
  end = jnp.asarray(position + 1, jnp.int32)
  clean = attention(q, k, v, start, end, implementation=implementation)
  k = k.at[:, :70].add(1e3)
  v = v.at[:, :70].set(1e6)
  other = attention(q, k, v, start, end, implementation=implementation)
  np.testing.assert_array_equal(clean[:, 70:], other[:, 70:])
  assert (np.abs(clean - other)[:, :70] > 1).any()


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_zero(implementation):
  """Padding is 0, never NaN, in outputs and gradients."""
  case = _case(20)
  out, grads = _run(case, implementation=implementation)
  assert not np.asarray(out[1, -2:]).any()
  assert all(np.isfinite(g).all() for g in grads)


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


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"implementation": "cudnn"}, "'cudnn' is unknown; allowed: auto"),
    ({"heads": 3}, "3 query heads cannot share 2"),
    ({"keys": 9}, "pass causal=False"),
  ],
)
def test_bad_calls_are_refused(options, message):
  """Unknown names never fall back; shapes are checked."""
  implementation = options.pop("implementation", "auto")
  q, k, v, start, end = _case(8, **({"causal": True} | options))
  with pytest.raises(ValueError, match=message):
    attention(q, k, v, start, end, implementation=implementation)
