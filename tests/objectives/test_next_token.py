"""The chunked loss equals the plain one, per target modality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.batch import Vocabulary, batch_of_ids
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.objectives import build_objective
from fusionlab.objectives.metrics import Mean
from fusionlab.objectives.next_token import NextToken, NextTokenConfig
from fusionlab.testing.batches import random_batch

VOCABULARY = Vocabulary(("text", "image"), (30, 20))
BYTES = np.concatenate([np.zeros(5), np.arange(25) % 4 + 1]).astype(np.int32)


@functools.cache
def _setup():
  config = MixtureOfTransformersConfig(
    dim=16, num_layers=1, num_heads=2, ffn_dim=16, compute_dtype="float32"
  )
  model = build_model(config, VOCABULARY)
  params = jax.jit(model.init_params)(jax.random.key(0))
  batch = random_batch(
    np.random.default_rng(0), VOCABULARY, rows=2, length=21, towers=(0, 1),
    padding=2, documents=2,
  )  # fmt: skip
  return model, params, batch


def _grad(f):
  return jax.jit(jax.value_and_grad(f, has_aux=True))


@functools.cache
def _plain():
  """Loss, scores of tokens and gradients, from all logits at once."""
  model, params, batch = _setup()

  def plain(p):
    logits = model.logits(p, model.apply({"params": p}, batch))
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(
      logits, batch.target[..., None], -1
    ).squeeze(-1)
    w = batch.weight
    loss = (w * (nll + 1e-2 * log_z**2)).sum() / w.sum()
    return loss, (nll, logits.argmax(-1) == batch.target)

  return _grad(plain)(params)


@pytest.mark.parametrize("chunk", [1, 5, 21, 1000])
def test_chunked_equals_plain(chunk):
  """Loss, z-loss, accuracy, bits per byte and gradients at any chunk."""
  model, params, batch = _setup()
  objective = build_objective(
    NextTokenConfig(z_loss=1e-2, chunk=chunk), VOCABULARY, BYTES
  )

  def chunked(p):
    means = objective(model, p, batch, train=True)
    return means["loss"].value(), means

  (loss, means), g = _grad(chunked)(params)
  (expected, (nll, correct)), g_expected = _plain()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    g,
    g_expected,
  )
  nll, w = np.asarray(nll), batch.weight
  for name, is_mine in (
    ("text", batch.target < 30),
    ("image", batch.target >= 30),
  ):
    mine = w * is_mine
    assert means[f"tokens/{name}"].value() == mine.sum()
    np.testing.assert_allclose(
      means[f"loss/{name}"].value(), (mine * nll).sum() / mine.sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
      means[f"accuracy/{name}"].value(),
      (mine * np.asarray(correct)).sum() / mine.sum(),
      rtol=1e-5,
    )
  table = np.concatenate([BYTES, np.zeros(20, np.int32)])
  size = table[batch.target] * w
  np.testing.assert_allclose(
    means["bits_per_byte/text"].value(),
    (nll * (size > 0)).sum() / np.log(2) / size.sum(),
    rtol=1e-5,
  )


def test_temporaries_do_not_grow_with_the_vocabulary_times_length():
  """At V=65,536 nothing holds B·L·V: a chunk gives its gradient at once."""
  vocabulary = Vocabulary(("text",), (65_536,), begin=(0,), end=(0,))
  config = MixtureOfTransformersConfig(
    modalities=("text",), towers=(0,), dim=16, num_layers=1, num_heads=2,
    ffn_dim=16, compute_dtype="float32",
  )  # fmt: skip
  model = build_model(config, vocabulary)
  objective = build_objective(
    NextTokenConfig(chunk=64), vocabulary, np.ones(65_536, np.int32)
  )
  params = model.abstract_params()
  sizes = []
  for length in (256, 1024):
    batch = random_batch(
      np.random.default_rng(0), vocabulary, rows=1, length=length, towers=(0,)
    )
    step = jax.grad(
      lambda p, b: objective(model, p, b, train=True)["loss"].total
    )
    compiled = jax.jit(step).lower(params, batch).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] - sizes[0] < 0.25 * 768 * 65_536 * 4


@pytest.mark.smoke
def test_means_add_and_an_empty_one_is_nan():
  """Totals and counts add; nothing counted is NaN, not 0."""
  a = Mean(jnp.float32(6.0), jnp.float32(2.0))
  b = Mean(jnp.float32(1.0), jnp.float32(5.0))
  assert (a + b).value() == 1.0
  assert np.isnan(Mean(jnp.float32(0.0), jnp.float32(0.0)).value())


def test_word_dropout_replaces_codes_by_codes():
  """At a rate of each document; texts stay."""
  rng = np.random.default_rng(0)
  code = lambda: rng.integers(30, 50, 400).tolist()  # noqa: E731
  captioned = [[1, 7, 8, 3, *code(), 4, 2] for _ in range(6)]
  pictures_first = [1, 3, *code(), 4, 9, 2]
  batch = batch_of_ids([*captioned, pictures_first], VOCABULARY, towers=(0, 1))
  objective = NextToken(NextTokenConfig(word_dropout=1.0), VOCABULARY, BYTES)
  tokens = np.asarray(objective._drop_words(batch, jax.random.key(0)).tokens)
  before = np.asarray(batch.tokens)
  text = before < 30
  np.testing.assert_array_equal(tokens[text], before[text])
  assert ((tokens >= 30) == ~text).all()
  rates = ((tokens != before) & ~text).sum(1) / 400
  assert rates.min() < 0.4 < 0.6 < rates.max()


def test_word_dropout_acts_in_training_alone():
  model, params, batch = _setup()
  key = jax.random.key(0)
  plain, dropped = (
    build_objective(NextTokenConfig(word_dropout=p), VOCABULARY, BYTES)
    for p in (0.0, 1.0)
  )

  @functools.partial(jax.jit, static_argnums=0, static_argnames="train")
  def value(objective, params, **options):
    return objective(model, params, batch, **options)["loss"].value()

  def loss(objective, **options):
    return float(value(objective, params, **options))

  expected = loss(plain, train=True, dropout_key=key)
  assert loss(dropped, train=False) == expected
  assert loss(dropped, train=True) == expected
  assert loss(dropped, train=True, dropout_key=key) != expected
