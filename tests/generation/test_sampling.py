"""Each cut against its definition; the draw against its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.generation import sampling
from fusionlab.generation.config import Sampling


@pytest.fixture
def logits():
  return np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kept(x):
  return np.isfinite(np.asarray(x))


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_top_k_keeps_the_k_likeliest(logits, k):
  got = kept(sampling.keep_top_k(jnp.asarray(logits), k))
  order = np.argsort(-logits, axis=1)[:, :k]
  expected = np.zeros_like(got)
  np.put_along_axis(expected, order, True, axis=1)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
  got = kept(sampling.keep_top_p(jnp.asarray(logits), p))
  probability = softmax(logits.astype(np.float64))
  for row in range(len(logits)):
    order = np.argsort(-logits[row])
    size = int((np.cumsum(probability[row][order]) < p).sum()) + 1
    assert set(np.flatnonzero(got[row])) == set(order[:size])


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_keeps_what_is_likely_enough(logits, p):
  got = kept(sampling.keep_min_p(jnp.asarray(logits), p))
  probability = softmax(logits.astype(np.float64))
  least = p * probability.max(-1, keepdims=True)
  np.testing.assert_array_equal(got, probability >= least * (1 - 1e-6))


def test_repetition_penalty_divides_or_multiplies():
  got = sampling.penalise(
    jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 4.0
  )
  np.testing.assert_allclose(got, [[0.5, -8.0, 2.0]])


def test_guidance_of_one_is_none_to_the_bit(logits):
  other = logits[::-1].copy()
  yes = jnp.ones(5, bool)
  np.testing.assert_array_equal(
    sampling.guide(jnp.asarray(logits), jnp.asarray(other), yes, 1.0), logits
  )
  got = sampling.guide(jnp.asarray(logits), jnp.asarray(other), yes, 3.0)
  np.testing.assert_allclose(got, other + 3 * (logits - other), rtol=1e-4)
  np.testing.assert_array_equal(
    sampling.guide(jnp.asarray(logits), jnp.asarray(other), ~yes, 3.0), logits
  )


def keys_of(n):
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(0), jnp.arange(n)
  )


def drawn(logits, settings, position=0):
  rows = jnp.tile(jnp.asarray(logits), (4000, 1))
  return np.asarray(
    sampling.draw(
      rows,
      keys_of(4000),
      jnp.full(4000, position),
      settings,
      sampling.numbers(settings),
    )
  )


def test_draws_follow_the_tempered_probabilities():
  logits = np.array([[1.0, 0.0, -1.0, 0.5]], np.float32)
  settings = Sampling(temperature=0.7, top_k=0)
  share = np.bincount(drawn(logits, settings), minlength=4) / 4000
  expected = softmax(logits / 0.7)[0]
  np.testing.assert_allclose(share, expected, atol=4 * 0.5 / 4000**0.5)


def test_cuts_apply_together():
  """Top-k 3, then a nucleus of 0.6 of what is left."""
  logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
  settings = Sampling(temperature=1.0, top_k=3, top_p=0.6)
  assert set(drawn(logits, settings)) == {0, 1}


def test_temperature_zero_takes_the_likeliest(logits):
  settings = Sampling(temperature=0.0)
  got = sampling.draw(
    jnp.asarray(logits),
    keys_of(5),
    jnp.arange(5),
    settings,
    sampling.numbers(settings),
  )
  np.testing.assert_array_equal(got, logits.argmax(1))


def test_randomness_belongs_to_the_position():
  logits = np.zeros((1, 40), np.float32)
  settings = Sampling(temperature=1.0, top_k=0)
  a, b, c = (drawn(logits, settings, position=p) for p in (3, 3, 4))
  np.testing.assert_array_equal(a, b)
  assert (a != c).mean() > 0.9


def test_equal_structure_for_other_numbers():
  """Values that are on share a program; what is off has none."""
  a = sampling.structure(Sampling(temperature=0.3, guidance=1.5))
  b = sampling.structure(Sampling(temperature=0.9, guidance=4.0))
  assert a == b
  assert a != sampling.structure(Sampling(temperature=0.3))
