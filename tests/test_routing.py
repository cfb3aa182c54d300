"""The layout is a permutation; route and unroute are each other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionlab import routing
from fusionlab.errors import UserError


def _case(seed, rows=4, length=6, towers=(0, 1, 2), group_rows=2, padding=0.2):
  rng = np.random.default_rng(seed)
  modality = rng.integers(0, len(towers), (rows, length)).astype(np.int32)
  real = rng.random((rows, length)) >= padding
  tower = np.asarray(towers)[modality].reshape(-1, group_rows * length)
  used = real.reshape(tower.shape)
  counts = [
    int(((tower == k) & used).sum(1).max()) for k in range(max(towers) + 1)
  ]
  short = group_rows * length - sum(counts)
  return modality, real, counts, short


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_layout_is_a_permutation_that_keeps_order_and_towers(seed):
  """Every position has one place, its own tower's, in sequence order."""
  modality, real, counts, short = _case(seed)
  if short < 0:
    with pytest.raises(UserError, match="layout"):
      routing.make_layout(
        modality, real, towers=(0, 1, 2), counts=counts, group_rows=2
      )
    return
  counts[seed % 3] += short
  layout = routing.make_layout(
    modality, real, towers=(0, 1, 2), counts=counts, group_rows=2
  )
  order = np.concatenate(layout.take, axis=1)
  np.testing.assert_array_equal(
    np.sort(order, axis=1), np.broadcast_to(np.arange(12), order.shape)
  )
  np.testing.assert_array_equal(
    np.take_along_axis(order, layout.place, axis=1),
    np.broadcast_to(np.arange(12), order.shape),
  )
  flat, used = modality.reshape(-1, 12), real.reshape(-1, 12)
  for k, take in enumerate(layout.take):
    assert (np.diff(take, axis=1) > 0).all()
    for g in range(take.shape[0]):
      assert set(np.flatnonzero(used[g] & (flat[g] == k))) <= set(take[g])


@pytest.mark.smoke
def test_layout_under_jit_equals_numpy():
  """The jittable maker gives what the loader's numpy maker gives."""
  modality, real, counts, short = _case(3, padding=0.6)
  counts[0] += short
  make = lambda m, r: routing.make_layout(  # noqa: E731
    m, r, towers=(0, 1, 2), counts=counts, group_rows=2
  )
  expected = make(modality, real)
  got = jax.jit(make)(jnp.asarray(modality), jnp.asarray(real))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_unroute_inverts_route_and_is_its_transpose():
  """unroute(route(x)) == x, and the VJP of each is the other, exactly."""
  modality, real, counts, short = _case(5, padding=0.6)
  counts[1] += short
  layout = routing.make_layout(
    modality, real, towers=(0, 1, 2), counts=counts, group_rows=2
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)))
  routed, pull = jax.vjp(lambda x: routing.route(x, layout), x)
  back, pull_back = jax.vjp(
    lambda r: routing.unroute(r, layout, length=6), routed
  )
  np.testing.assert_array_equal(back, x)
  (g,) = pull(routed)
  np.testing.assert_array_equal(g, x)
  (g,) = pull_back(x)
  jax.tree.map(np.testing.assert_array_equal, g, routed)


def test_moves_compile_to_no_scatter(compiler_options):
  """Gradients through route and unroute are gathers."""
  modality, real, counts, short = _case(5, padding=0.6)
  counts[1] += short
  layout = routing.make_layout(
    modality, real, towers=(0, 1, 2), counts=counts, group_rows=2
  )

  def f(x):
    routed = tuple(jnp.sin(r) for r in routing.route(x, layout))
    return (routing.unroute(routed, layout, length=6) ** 2).sum()

  lowered = jax.jit(jax.grad(f)).lower(jnp.ones((4, 6, 5)))
  text = lowered.compile(compiler_options).as_text()
  assert "gather(" in text
  assert "scatter(" not in text


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: routing.make_layout(
        np.zeros((2, 4), np.int32),
        np.ones((2, 4), bool),
        towers=(0, 1),
        counts=(4, 3),
        group_rows=2,
      ),
      "8 needed",
    ),
    (
      lambda: routing.make_layout(
        np.zeros((2, 4), np.int32),
        np.ones((2, 4), bool),
        towers=(0, 1),
        counts=(4, 4),
        group_rows=2,
      ),
      "8 tokens for tower 0, which has 4 places",
    ),
  ],
)
def test_bad_layouts_are_refused_in_one_line(call, message):
  """Each mistake names what was given and what would do."""
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
