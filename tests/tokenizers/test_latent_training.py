"""Training of picture latents: it learns, repeats, and normalises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.config import from_mapping
from fusionlab.errors import ConfigError, UserError
from fusionlab.tokenizers.autoencoder import LatentConfig
from fusionlab.tokenizers.latent_training import (
  LatentTrainConfig,
  divergence,
  init_state,
  make_train_step,
  measure,
  train,
)

SIZES = LatentConfig(
  image_size=16,
  downsampling=4,
  channels=2,
  fine_channels=8,
  coarse_channels=8,
  encoder_coarse_blocks=0,
  decoder_coarse_blocks=0,
  decoder_fine_blocks=1,
)
CONFIG = LatentTrainConfig(
  num_steps=20, batch_size=8, learning_rate=1e-2, kl=1e-3, shift=0, permute=0.0
)


def squares(number=24):
  """White pictures with one coloured quarter."""
  rng = np.random.default_rng(0)
  images = np.full((number, 16, 16, 3), 255, np.uint8)
  for image in images:
    y, x = rng.integers(0, 2, 2) * 8
    image[y : y + 8, x : x + 8] = rng.permutation([255, 0, 0])
  return images


@pytest.fixture(scope="module")
def trained():
  """Twenty steps on squares."""
  return train(squares(), SIZES, CONFIG, {"a": 1})


@pytest.fixture(scope="module")
def step():
  """One step, compiled."""
  return jax.jit(make_train_step(SIZES, CONFIG))


@pytest.mark.smoke
def test_training_lowers_the_loss_and_repeats_exactly(trained, step):
  """Error after twenty steps against that of the first, and the hash."""
  _, before = step(init_state(SIZES, CONFIG), squares(8))
  after = measure(trained, squares())
  assert after["mse"] < 0.5 * before["mse"] and after["l1"] < before["l1"]
  assert train(squares(), SIZES, CONFIG, {"a": 1}).hash == trained.hash
  assert trained.notes == {"a": 1} and trained.config == SIZES


def test_the_seed_decides_the_weights():
  """The same seed gives the same to the bit, another seed others."""
  kernels = [
    init_state(SIZES, LatentTrainConfig(seed=seed)).params["encoder"]["patches"]
    for seed in (0, 0, 1)
  ]
  first, again, other = (np.asarray(k["kernel"]) for k in kernels)
  assert (first == again).all() and (first != other).all()


def test_latents_of_the_training_pictures_have_mean_0_and_variance_1(trained):
  """Per channel, over all pictures and places, to rounding."""
  latents = trained.encode(squares()).reshape(-1, SIZES.channels)
  assert abs(latents.mean(0)).max() < 1e-4
  assert abs(latents.std(0) - 1).max() < 1e-4


def test_the_divergence_is_that_of_the_closed_form():
  """Zero for the standard normal; else against an integral on a grid."""
  shape = (2, 1, 1, 1)
  mean = jnp.array([0.0, 0.7]).reshape(shape)
  log_variance = jnp.array([0.0, -1.2]).reshape(shape)
  x = np.linspace(-12, 12, 20_001)
  std = np.exp(-0.6)
  p = np.exp(-((x - 0.7) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
  log_ratio = -((x - 0.7) ** 2) / (2 * std**2) - np.log(std) + x**2 / 2
  expected = (p * log_ratio).sum() * (x[1] - x[0])
  found = divergence(mean, log_variance)
  assert found == pytest.approx([0, expected], abs=1e-5)
  # Of a whole picture: a sum over places and channels.
  whole = jnp.full((1, 4, 4, 2), 0.7), jnp.full((1, 4, 4, 2), -1.2)
  assert divergence(*whole) == pytest.approx([32 * expected], rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms(step):
  """Every weight is of its own term."""
  _, metrics = step(init_state(SIZES, CONFIG), squares(8))
  terms = {key: float(metrics[key]) for key in ("mse", "l1", "kl")}
  assert min(terms.values()) > 0.01
  expected = sum(getattr(CONFIG, key) * term for key, term in terms.items())
  assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_latents_are_drawn_and_not_the_mean(step):
  """With wide posteriors the error is another, and so is that of each step."""
  errors = []
  for log_variance, number in ((-30.0, 0), (6.0, 0), (6.0, 1)):
    state = init_state(SIZES, CONFIG)
    latents = state.params["encoder"]["latents"]
    latents["bias"] = latents["bias"].at[SIZES.channels :].set(log_variance)
    state = dataclasses.replace(state, step=jnp.asarray(number, jnp.int32))
    _, metrics = step(state, squares(8))
    errors.append(float(metrics["mse"]))
  assert errors[1] > 2 * errors[0] and errors[2] != errors[1]


def test_measures_are_of_pixels_in_0_to_1(trained):
  """PSNR of the mean squared error, in dB; nats; one std a channel."""
  images = squares(5)
  decoded = trained.decode(trained.encode(images))
  error = decoded / 255.0 - images / 255.0
  measured = measure(trained, images)
  assert measured["pictures"] == 5
  assert measured["mse"] == pytest.approx((error**2).mean(), rel=1e-4)
  assert measured["psnr"] == pytest.approx(
    -10 * np.log10((error**2).mean()), rel=1e-4
  )
  assert measured["kl"] > 0
  latents = trained.encode(images).reshape(-1, 2)
  assert [measured["std_0"], measured["std_1"]] == pytest.approx(
    list(latents.std(0)), rel=1e-4
  )


@pytest.mark.parametrize("shape", [(0, 16, 16, 3), (2, 32, 32, 3)])
def test_pictures_that_do_not_fit_are_refused(shape):
  """None at all, or another size."""
  with pytest.raises(UserError, match="latent tokenizer: the pictures are"):
    train(np.zeros(shape, np.uint8), SIZES, CONFIG)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"downsampling": 3}, "downsampling=3 must be even and divide"),
    ({"downsampling": 12}, "divide config.image_size=64"),
    ({"patch": 5}, "patch=5 does not divide the 16 latents .* 1, 2, 4, 8, 16$"),
    ({"channels": 0}, "at least 1"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  """By the key's name, with what is allowed."""
  with pytest.raises(ConfigError, match=message):
    from_mapping(LatentConfig, sizes)
