"""Training of picture codes: it learns, revives dead codes and repeats."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.tokenizers.autoencoder import ImageConfig
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.image_training import (
  ImageTrainConfig,
  follow,
  init_state,
  make_train_step,
  measure,
  perplexity,
  revive,
  train,
)
from fusionlab.tokenizers.training import augment, order

SIZES = ImageConfig(
  image_size=16,
  patch=4,
  codebook_size=8,
  code_dim=4,
  fine_channels=8,
  coarse_channels=8,
  encoder_coarse_blocks=0,
  decoder_coarse_blocks=0,
  decoder_fine_blocks=1,
)
CONFIG = ImageTrainConfig(
  num_steps=150, batch_size=8, learning_rate=1e-2, shift=0, permute=0.0
)


def squares(number=24):
  """White pictures with one coloured quarter."""
  rng = np.random.default_rng(0)
  images = np.full((number, 16, 16, 3), 255, np.uint8)
  for image in images:
    y, x = rng.integers(0, 2, 2) * 8
    image[y : y + 8, x : x + 8] = rng.permutation([255, 0, 0])
  return images


@pytest.mark.smoke
def test_training_lowers_the_error_and_repeats_exactly():
  images = squares()
  first, again = (train(images, SIZES, CONFIG, {"a": 1}) for _ in range(2))
  untrained = init_state(SIZES, CONFIG)
  start = ImageTokenizer.from_params(
    SIZES, untrained.params, untrained.codebook
  )
  assert measure(first, images)["mse"] < 0.5 * measure(start, images)["mse"]
  assert first.hash == again.hash
  assert first.notes == {"a": 1} and first.config == SIZES


def test_the_seed_decides_weights_and_order():
  kernels, batches = [], []
  for seed in (0, 0, 1):
    state = init_state(SIZES, ImageTrainConfig(seed=seed))
    kernels.append(state.params["encoder"]["patches"]["kernel"])
    batches.append(list(next(order(100, 8, seed))))
  assert (kernels[0] == kernels[1]).all() and batches[0] == batches[1]
  assert (kernels[0] != kernels[2]).all() and batches[0] != batches[2]


def state_with(counts):
  state = init_state(SIZES, CONFIG)
  codebook = jnp.arange(32.0).reshape(8, 4)
  counts = jnp.asarray(counts, jnp.float32)
  return state.replace(
    codebook=codebook, counts=counts, sums=codebook * counts[:, None]
  )


def test_only_dead_codes_are_revived_each_at_a_latent_of_its_own():
  state = state_with([0.0, 0.029, 0.031, 5, 5, 5, 5, 5])
  latents = 100 + jnp.arange(48.0).reshape(12, 4)
  new = revive(state, latents, jax.random.key(0), 0.03)
  assert (new.codebook[2:] == state.codebook[2:]).all()
  assert (new.counts[2:] == state.counts[2:]).all()
  places = [
    int(np.flatnonzero((np.asarray(latents) == np.asarray(code)).all(-1))[0])
    for code in new.codebook[:2]
  ]
  assert len(set(places)) == 2
  assert (new.counts[:2] == 1).all()
  assert (new.sums[:2] == new.codebook[:2]).all()


def test_a_batch_smaller_than_the_codebook_revives_too():
  latents = jnp.full((3, 4), 7.0)
  new = revive(state_with([0.0] * 8), latents, jax.random.key(0), 0.03)
  assert (new.codebook == 7).all()


def test_revival_stops_where_the_config_says():
  config = ImageTrainConfig(num_steps=10, batch_size=8, revive_until=0.8)
  step = jax.jit(make_train_step(SIZES, config))
  # A code so far away that no latent chooses it.
  state = state_with([5.0] * 7 + [0.0])
  state = state.replace(codebook=state.codebook.at[7].set(1e6))
  for done, revived in ((7, True), (8, False)):
    new, _ = step(state.replace(step=jnp.int32(done)), squares(8))
    assert bool((jnp.abs(new.codebook[7]) < 1e5).all()) == revived


def test_codes_are_the_moving_means_of_what_chose_them():
  state = state_with([2.0] * 7 + [0.0])
  latents = jnp.array([[1.0, 2, 3, 4], [3.0, 2, 1, 0]])
  new = follow(state, latents, jnp.array([0, 0]), decay=0.9)
  assert new.counts[0] == pytest.approx(0.9 * 2 + 0.1 * 2)
  mean = (0.9 * 2 * state.codebook[0] + 0.1 * latents.sum(0)) / new.counts[0]
  assert np.allclose(new.codebook[0], mean)
  assert np.allclose(new.codebook[1:], state.codebook[1:], atol=1e-5)


def test_augmentation_moves_pixels_and_makes_none():
  images = jnp.asarray(squares(8), jnp.float32)
  changed = augment(images, jax.random.key(0), ImageTrainConfig(permute=1.0))
  assert not (changed == images).all()
  assert np.allclose(changed.sum((1, 2, 3)), images.sum((1, 2, 3)))
  off = ImageTrainConfig(shift=0, flip=0.0, permute=0.0)
  assert (augment(images, jax.random.key(0), off) == images).all()


def test_every_epoch_shows_every_picture_once():
  batches = list(itertools.islice(order(10, 4, seed=0), 10))
  shown = np.concatenate(batches)
  for epoch in shown.reshape(4, 10):
    assert sorted(epoch) == list(range(10))
  assert (shown[:10] != shown[10:20]).any()
  assert [len(b) for b in itertools.islice(order(3, 8, 0), 2)] == [8, 8]


def test_perplexity_is_the_number_of_codes_in_even_use():
  assert perplexity(jnp.array([3.0, 3, 3, 0])) == pytest.approx(3)
  assert perplexity(jnp.array([9.0, 0, 0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(0, 16, 16, 3), (2, 32, 32, 3)])
def test_pictures_that_do_not_fit_are_refused(shape):
  with pytest.raises(UserError, match="the pictures are"):
    train(np.zeros(shape, np.uint8), SIZES, CONFIG)


def test_a_loss_that_is_not_finite_stops_with_advice():
  config = ImageTrainConfig(num_steps=60, batch_size=8, learning_rate=1e30)
  with pytest.raises(UserError, match="try a smaller learning_rate"):
    train(squares(), SIZES, config)
