"""The loss of text and pictures, however they are packed, split and dealt out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusionlab.errors import UserError
from fusionlab.nn.functional.diffusion import Process
from fusionlab.objectives import build_objective
from fusionlab.objectives.diffusion import (
  NextTokenDiffusion,
  NextTokenDiffusionConfig,
)
from fusionlab.objectives.noise import normal_of_values
from fusionlab.sharding import rules
from fusionlab.sharding.batches import batch_shardings, split_rows
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from fusionlab.train.state import new_state
from fusionlab.train.step import make_train_step
from tests.models import pictures
from tests.models.pictures import GRID, PATCH, PICTURE, VOCABULARY
from tests.objectives.pictures import (
  BYTES,
  Tables,
  batch_of,
  logits_of,
  random_pictures,
  words,
)
from tests.objectives.test_next_token import VOCABULARY as CODES

MODEL, FLOW, KEY = Tables(), Tables(Process("flow")), jax.random.key(3)
PARAMS = MODEL.init()


@functools.cache
def objective_of(**settings):
  config = NextTokenDiffusionConfig(**settings)
  return build_objective(config, VOCABULARY, BYTES)


@functools.partial(jax.jit, static_argnums=(0, 4))
def trained(objective, params, batch, key, model=MODEL):
  """Means and gradients of a step on the whole batch."""

  def f(params):
    means = objective(
      model, params, objective.balance(batch), train=True, dropout_key=key
    )
    return means["loss"].total / jnp.maximum(means["loss"].count, 1), means

  (loss, means), gradients = jax.value_and_grad(f, has_aux=True)(params)
  return loss, means, gradients


@functools.partial(jax.jit, static_argnums=0)
def heldout(objective, params, batch):
  return objective(MODEL, params, batch, train=False)


@functools.partial(jax.jit, static_argnums=(0, 3))
def drawn(objective, batch, key, process=MODEL.process):
  return objective._draw(process, jax.tree.map(jnp.asarray, batch), key)


noise_of = jax.jit(normal_of_values, static_argnums=0)


def spans_of(batch):
  """(row, positions) of every picture."""
  return [
    (row, np.flatnonzero(batch.span[row] == number))
    for row in range(len(batch.span))
    for number in range(1, batch.span[row].max() + 1)
  ]


def language_loss(params, batch, time=None, latents=None, z_loss=1e-5):
  """Mean over the text's targets, from all logits at once."""
  seen = dataclasses.replace(
    batch, time=time, latents=batch.latents if latents is None else latents
  )
  logits = np.asarray(logits_of(MODEL, params, seen), np.float64)
  # All but the last id, the placeholder of patches, which is never next.
  log_z = np.log(np.exp(logits[..., :-1]).sum(-1))
  nll = log_z - np.take_along_axis(logits, batch.target[..., None], -1)[..., 0]
  weight = batch.weight * (batch.span == 0)
  return (weight * (nll + z_loss * log_z**2)).sum() / weight.sum()


def picture_losses(process, params, batch, time, noise):
  """Mean square of each picture's error."""
  clean, noise = jnp.asarray(batch.latents), jnp.asarray(noise)
  noisy = process.noisy(clean, noise, time)
  noisy = np.where((batch.span > 0)[..., None], noisy, 0)
  seen = dataclasses.replace(batch, latents=noisy, time=jnp.asarray(time))
  seen = jax.tree.map(jnp.asarray, seen)
  _, prediction = MODEL.apply(
    {"params": params}, seen, train=True, denoise=True
  )
  error = np.square(prediction - process.target(clean, noise))
  losses = [error[row, places].mean() for row, places in spans_of(batch)]
  return np.asarray(losses), noisy


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("model", "settings"),
  [(MODEL, {}), (FLOW, {"diffusion_weight": 0.5})],
  ids=("ddpm", "flow"),
)
def test_the_loss_is_both_means(model, settings):
  """Over text targets, and lambda times over pictures, whatever the packing."""
  objective = objective_of(**settings)
  batch = random_pictures(0)
  loss, means, _ = trained(objective, PARAMS, batch, KEY, model)
  key = jax.random.fold_in(KEY, 2)
  time, noise = map(np.asarray, drawn(objective, batch, key, model.process))
  losses, noisy = picture_losses(model.process, PARAMS, batch, time, noise)
  text = language_loss(PARAMS, batch, jnp.asarray(time), noisy)
  np.testing.assert_allclose(
    loss,
    text + settings.get("diffusion_weight", 5.0) * losses.mean(),
    rtol=1e-5,
  )
  assert means["pictures"].value() == len(losses)
  assert means["tokens/image"].value() == (batch.span > 0).sum()
  np.testing.assert_allclose(
    means["loss/image"].value(), losses.mean(), rtol=1e-5
  )
  # Each picture is in the bucket of its level, and no other.
  levels = np.asarray([time[row, at[0]] for row, at in spans_of(batch)])
  for k, level in enumerate(objective.config.heldout_times):
    mine = (levels > 0.2 * k) & (levels <= 0.2 * k + 0.2)
    found = means[f"mse/image/t{level:g}"]
    assert (found.count > 0) == mine.any()
    if mine.any():
      expected = losses[mine].mean()
      np.testing.assert_allclose(found.value(), expected, rtol=1e-5)


def test_no_next_token_is_scored_at_or_before_patches():
  """Neither at <boi> nor at a patch; at <eoi> it is."""
  objective, batch = objective_of(), random_pictures(1)
  before = np.pad(batch.span > 0, ((0, 0), (0, 1)))[:, 1:]
  silent = before | (batch.span > 0)
  assert (batch.tokens[before & (batch.span == 0)] == 3).all()
  target = np.where(silent, 7, batch.target)
  other = dataclasses.replace(batch, target=target)
  for f in (
    lambda b: trained(objective, PARAMS, b, KEY)[1],
    lambda b: heldout(objective, PARAMS, b),
  ):
    means, changed = f(batch), f(other)
    jax.tree.map(np.testing.assert_array_equal, means, changed)
    ends = np.pad(batch.segment, ((0, 0), (0, 1)))[:, 1:] != batch.segment
    scored = (batch.segment > 0) & ~silent & ~ends
    assert means["tokens/text"].value() == scored.sum()
  assert (batch.weight[batch.tokens == 4] == 1).all()


def expected_limit(batch, row, places):
  """Half the levels where the picture comes before the document's text."""
  document = batch.segment[row] == batch.segment[row, places[0]]
  text = np.isin(batch.tokens[row], range(5, PATCH)) & document
  column = np.arange(len(text))
  before = text & (column < places[0])
  after = text & (column > places[-1])
  return 0.5 if after.any() and not before.any() else 1.0


@pytest.mark.parametrize(
  ("process", "settings"),
  [
    (Process(), {}),
    (Process("flow"), {}),
    (Process("flow"), {"flow_time": "logit_normal"}),
    (Process("ddpm", 4), {}),
  ],
  ids=str,
)
def test_a_picture_has_one_level_within_its_limit(process, settings):
  """A property of random packings: half the levels before its document's text."""
  objective = objective_of(**settings)
  levels = {0.5: [], 1.0: []}
  for seed in range(40):
    batch = random_pictures(seed)
    key = jax.random.key(seed)
    time, noise = map(np.asarray, drawn(objective, batch, key, process))
    assert (time[batch.span == 0] == 0).all()
    assert noise.shape == batch.latents.shape
    for row, places in spans_of(batch):
      assert len(set(time[row, places])) == 1
      limit = expected_limit(batch, row, places)
      levels[limit].append(float(time[row, places[0]]))
  for limit, found in levels.items():
    found = np.asarray(found)
    assert len(found) > 50
    assert found.min() > 0 and found.max() <= limit
    assert len(set(found)) > (1 if process.num_timesteps == 4 else 40)
    # Evenly drawn, to four standard errors; in the middle of the limit all are.
    centre = limit / 2
    if process.kind == "ddpm":
      t = found * process.num_timesteps
      np.testing.assert_allclose(t, np.round(t), atol=1e-3)
      centre += 0.5 / process.num_timesteps
    assert abs(found.mean() - centre) < 4 * 0.3 * limit / len(found) ** 0.5
  if objective.config.flow_time == "logit_normal":
    assert np.std(levels[1.0]) < 0.25  # uniform: 0.289
  # Without a limit the first pictures get all levels too.
  no_limit = objective_of(**settings, noise_limit=1.0)
  times = [
    np.asarray(
      drawn(no_limit, random_pictures(s), jax.random.key(s), process)[0]
    )
    for s in range(8)
  ]
  assert max(t.max() for t in times) > 0.9


def test_levels_and_noise_depend_on_the_key():
  objective, batch = objective_of(), random_pictures(0)
  again = [trained(objective, PARAMS, batch, key)[0] for key in (KEY, KEY)]
  other = trained(objective, PARAMS, batch, jax.random.key(4))[0]
  assert again[0] == again[1] != other


class FromValues(NextTokenDiffusion):
  """Levels and noise from the pictures, so that any split has the same."""

  def _draw(self, process, batch, key):
    del process, key
    inside = batch.span > 0
    level = jnp.where(inside, batch.position % 9 * 0.1 + 0.05, 0.0)
    return level, jnp.sin(40 * batch.latents)


def test_microbatches_change_nothing():
  """Of other numbers of pictures and targets each, one without any picture."""
  rng = np.random.default_rng(0)
  picture = [1, *PICTURE, 2]
  rows = [
    [[1, *words(rng, 30), 2]],
    [picture, picture, picture],
    [[1, *words(rng), *PICTURE, 2], picture],
    [[1, *PICTURE, *words(rng), *PICTURE, 2]],
  ]
  batch = batch_of(rows, rng, length=32)
  config = NextTokenDiffusionConfig(diffusion_weight=3.0, chunk=8)
  objective = FromValues(config, VOCABULARY, BYTES)
  results = []
  for accumulate in (1, 4):
    step = make_train_step(
      MODEL, objective, optax.sgd(1.0), dropout_seed=0, accumulate=accumulate
    )
    state = new_state(jax.tree.map(jnp.copy, PARAMS), optax.sgd(1.0))
    state, metrics = step(state, batch)
    means = {
      name: metrics[name].value()
      for name in ("loss", "loss/text", "loss/image")
    }
    results.append((state.params, means, metrics["grad_norm"]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    *results,
  )
  means = results[0][1]
  z = 1e-5 * 20
  np.testing.assert_allclose(
    means["loss"], means["loss/text"] + 3 * means["loss/image"], atol=z
  )


def test_batches_without_pictures_or_without_text_train():
  """Losses and gradients are finite, and the other half is as if alone."""
  objective, rng = objective_of(), np.random.default_rng(0)
  text = batch_of([[[1, *words(rng), 2]]] * 4, rng, length=48)
  loss, means, gradients = trained(objective, PARAMS, text, KEY)
  np.testing.assert_allclose(loss, language_loss(PARAMS, text), rtol=1e-5)
  assert means["loss/image"].count == 0 == means["pictures"].total
  assert not gradients["leave"].any()
  held = heldout(objective, PARAMS, text)
  np.testing.assert_allclose(held["loss"].value(), loss, rtol=1e-5)
  # Nothing but patches, as no document is: there is no target.
  bare = batch_of([[[PATCH] * GRID.positions]] * 4, rng, length=48)
  loss, means, gradients = trained(objective, PARAMS, bare, KEY)
  np.testing.assert_allclose(loss, 5 * means["loss/image"].value(), rtol=1e-5)
  assert means["loss/text"].count == 0
  assert gradients["leave"].any() and not gradients["out"].any()
  for tree in (gradients, heldout(objective, PARAMS, bare)):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_heldout_pictures_are_scored_at_every_level():
  """With the same noise; text beside clean pictures."""
  times = (0.25, 1.0)
  objective = objective_of(heldout_times=times)
  batch = random_pictures(2)
  means = heldout(objective, PARAMS, batch)
  noise = np.asarray(noise_of(0, batch))
  expected = []
  for level in times:
    time = np.where(batch.span > 0, level, 0).astype(np.float32)
    losses, _ = picture_losses(MODEL.process, PARAMS, batch, time, noise)
    expected.append(losses.mean())
    found = means[f"mse/image/t{level:g}"]
    np.testing.assert_allclose(found.value(), expected[-1], rtol=1e-5)
  assert not np.isclose(*expected, rtol=1e-3)
  np.testing.assert_allclose(
    means["loss/image"].value(), np.mean(expected), rtol=1e-5
  )
  clean = language_loss(PARAMS, batch, jnp.zeros(batch.tokens.shape), z_loss=0)
  np.testing.assert_allclose(means["loss/text"].value(), clean, rtol=1e-5)
  np.testing.assert_allclose(
    means["loss"].value(), clean + 5 * np.mean(expected), rtol=1e-4
  )


def test_heldout_noise_is_the_picture_s_own():
  """Wherever it stands and in whatever batch; another seed, other noise."""
  batch = random_pictures(3)
  noise = np.asarray(noise_of(0, batch))
  assert 0.8 < noise[batch.span > 0].std() < 1.2
  of_picture = {}
  for row, places in spans_of(batch):
    of_picture[batch.latents[row, places].tobytes()] = noise[row, places]
  # Alone, one in a row, after a word.
  for values, expected in list(of_picture.items())[:4]:
    alone = batch_of([[[1, 9, *PICTURE, 2]]], np.random.default_rng(0))
    alone.latents[0, 3:-2] = np.frombuffer(values, np.float32).reshape(4, -1)
    found = normal_of_values(0, alone)[0, 3:-2]
    np.testing.assert_array_equal(found, expected)
  stacked = np.stack(list(of_picture.values()))
  assert len(np.unique(stacked[..., 0])) == stacked[..., 0].size
  assert not np.isclose(noise_of(1, batch), noise)[batch.span > 0].any()


def test_rows_dealt_to_devices_have_the_same_loss():
  """Levels and noise are of positions of the sequence (`Batch.stored`)."""
  objective, batch = objective_of(chunk=16), random_pictures(5)
  mesh = make_mesh(MeshConfig(data=2, sequence=2))
  dealt = split_rows(batch, 2)
  time, noise = map(np.asarray, drawn(objective, batch, KEY))
  for whole, found in zip(
    (time, noise), drawn(objective, dealt, KEY), strict=True
  ):
    back = np.asarray(
      [f[at] for f, at in zip(found, dealt.stored, strict=True)]
    )
    inside = batch.span > 0
    np.testing.assert_array_equal(back[inside], whole[inside])
  expected = trained(objective, PARAMS, batch, KEY)
  placed = jax.device_put(dealt, batch_shardings(dealt, mesh))

  @jax.jit
  def both(params, batch):
    with rules.in_mesh(mesh):
      return (
        trained.__wrapped__(objective, params, batch, KEY),
        heldout.__wrapped__(objective, params, batch),
      )

  found, held = both(jax.device_put(PARAMS, rules.replicated(mesh)), placed)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)

  jax.tree.map(close, found, expected)
  jax.tree.map(close, held, heldout(objective, PARAMS, batch))


def test_the_model_trains_on_it():
  """Levels reach the model, and gradients its patches and both towers."""
  model, params = pictures.make(num_layers=1)
  batch = pictures.batch_for(model, seed=1, rows=4, length=48)
  batch = dataclasses.replace(batch, time=None)
  objective = objective_of()
  _, means, gradients = trained(objective, params, batch, KEY, model)
  time, noise = drawn(objective, batch, jax.random.fold_in(KEY, 2))
  clean = jnp.asarray(batch.latents)
  noisy = jnp.where(
    (batch.span > 0)[..., None], model.process.noisy(clean, noise, time), 0
  )
  seen = dataclasses.replace(batch, latents=noisy, time=time)
  _, prediction = pictures.denoise(model, params, seen)
  error = np.square(prediction - noise)
  losses = [error[row, places].mean() for row, places in spans_of(batch)]
  np.testing.assert_allclose(
    means["loss/image"].value(), np.mean(losses), rtol=1e-5
  )
  leaves = jax.tree.leaves(gradients)
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def test_word_dropout_leaves_pictures():
  objective, batch = objective_of(word_dropout=1.0), random_pictures(0)
  kept = jax.jit(objective._drop_words)(batch, KEY)
  np.testing.assert_array_equal(kept.tokens, batch.tokens)


def test_what_the_objective_needs_is_said():
  with pytest.raises(UserError, match=r"text, image are all discrete.*kl"):
    build_objective(NextTokenDiffusionConfig(), CODES, BYTES)
  with pytest.raises(UserError, match="dropout_key"):
    objective_of()(MODEL, PARAMS, random_pictures(0), train=True)
