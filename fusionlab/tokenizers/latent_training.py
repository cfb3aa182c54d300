"""Training of continuous picture latents: one pure step, a loop, a report.

The loss is a mean squared and a mean absolute error of pixels, of a latent drawn
from its posterior, and a small weight on the divergence of the posterior from the
standard normal (Kingma and Welling 2014, arXiv:1312.6114, §2.4 and appendix B).
Transfusion's autoencoder (arXiv:2408.11039, §3.2) and latent diffusion's
(arXiv:2112.10752, appendix G) add a perceptual and an adversarial loss, and the
former one on the features of a pretrained network. Two of the three need weights
that no Python package brings, and without them nothing holds the adversarial
one's inventions to the picture, so none of them is here.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from fusionlab.config import option
from fusionlab.tokenizers.autoencoder import (
  LatentConfig,
  init_params,
  pixels_of,
)
from fusionlab.tokenizers.latents import LatentTokenizer, posterior_of
from fusionlab.tokenizers.training import (
  AutoencoderTrainConfig,
  augment,
  check_pictures,
  make_optimizer,
  reconstruction,
  run_steps,
)


@dataclasses.dataclass(frozen=True)
class LatentTrainConfig(AutoencoderTrainConfig):
  """How the tokenizer of continuous latents is trained."""

  num_steps: int = option(6000, "optimizer steps", minimum=1)
  batch_size: int = option(8, "pictures per step", minimum=1)
  learning_rate: float = option(4e-3, "Adam's, cosine to 0", minimum=0.0)
  kl: float = option(
    1e-6,
    "weight of the posterior's divergence from the standard normal, in nats of"
    " a whole picture",
    minimum=0.0,
  )


@flax.struct.dataclass
class State:
  """Everything a step changes.

  Attributes:
    params: weights of encoder and decoder.
    optimizer: Adam's moments.
    step: steps done.
  """

  params: dict
  optimizer: optax.OptState
  step: Int[Array, ""]


def init_state(sizes: LatentConfig, config: LatentTrainConfig) -> State:
  """Returns the state before the first step."""
  params = init_params(sizes, jax.random.key(config.seed))
  return State(
    params=params,
    optimizer=make_optimizer(config).init(params),
    step=jnp.zeros((), jnp.int32),
  )


def divergence(
  mean: Float[Array, "N h w c"], log_variance: Float[Array, "N h w c"]
) -> Float[Array, "N"]:
  """KL of each picture's posterior from the standard normal, nats, its sum."""
  each = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
  return each.sum((1, 2, 3))


def make_train_step(
  sizes: LatentConfig, config: LatentTrainConfig
) -> Callable[[State, UInt8[Array, "B S S 3"]], tuple[State, dict]]:
  """Returns `step(state, images) -> (state, metrics)`, pure and jit-able.

  Metrics are float32 scalars: "loss", "mse" and "l1" (of pixels in 0..1), and
  "kl", nats of a picture. Randomness depends on the seed and `state.step` alone.
  """
  optimizer = make_optimizer(config)

  def step(state, images):
    root = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_key, noise_key = jax.random.split(root)
    pixels = augment(images.astype(jnp.float32) / 255, augment_key, config)

    def loss_of(params):
      mean, log_variance = posterior_of(sizes, params, pixels)
      noise = jax.random.normal(noise_key, mean.shape)
      latents = mean + jnp.exp(log_variance / 2) * noise
      error = pixels_of(sizes, params, latents) - pixels
      mse, l1 = (error**2).mean(), jnp.abs(error).mean()
      kl = divergence(mean, log_variance).mean()
      loss = config.mse * mse + config.l1 * l1 + config.kl * kl
      return loss, {"loss": loss, "mse": mse, "l1": l1, "kl": kl}

    gradient, metrics = jax.grad(loss_of, has_aux=True)(state.params)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    new_state = dataclasses.replace(
      state,
      params=optax.apply_updates(state.params, updates),
      optimizer=moments,
      step=state.step + 1,
    )
    return new_state, metrics

  return step


@functools.cache
def _compiled_step(sizes: LatentConfig, config: LatentTrainConfig) -> Callable:
  return jax.jit(make_train_step(sizes, config), donate_argnums=0)


def train(
  images: UInt8[np.ndarray, "N S S 3"],
  sizes: LatentConfig,
  config: LatentTrainConfig,
  notes: dict | None = None,
) -> LatentTokenizer:
  """Trains a tokenizer for exactly `config.num_steps` steps.

  Its normalisation is of the weights as stored, over these pictures as they are.

  Args:
    images: the pictures to learn from, of `sizes.image_size`.
    sizes: of the tokenizer.
    config: of the training.
    notes: JSON-ready; kept in the tokenizer's file.

  Raises:
    UserError: no pictures, another size, or a loss that is not finite; a channel
      that is the same for all pictures.
  """
  what = LatentTokenizer.kind
  check_pictures(images, sizes, what)
  shown = {"mse": "mse {:.4f}", "l1": "l1 {:.4f}", "kl": "kl {:.0f}"}
  step = _compiled_step(sizes, config)
  state = run_steps(
    step, init_state(sizes, config), images, config, what, shown
  )
  zeros, ones = np.zeros(sizes.channels), np.ones(sizes.channels)
  raw = LatentTokenizer.from_params(sizes, state.params, zeros, ones)
  mean, _ = raw.posterior(images)
  flat = mean.reshape(-1, sizes.channels).astype(np.float64)
  return LatentTokenizer.from_params(
    sizes, state.params, flat.mean(0), flat.std(0), notes
  )


def measure(
  tokenizer: LatentTokenizer, images: UInt8[np.ndarray, "N S S 3"]
) -> dict[str, float]:
  """Reconstruction error and distribution of latents, not augmented.

  Returns:
    What `reconstruction` gives; "kl", nats of a picture's posterior, the mean;
    "std_0" and on, of each channel of the normalised latents over pictures and
    places: 1 over the training pictures together.
  """
  patches = tokenizer.encode(images)
  channels = tokenizer.grid.channels
  std = patches.reshape(-1, channels).astype(np.float64).std(0)
  mean, log_variance = tokenizer.posterior(images)
  kl = divergence(jnp.asarray(mean), jnp.asarray(log_variance)).mean()
  return (
    reconstruction(images, tokenizer.decode(patches))
    | {"kl": float(kl)}
    | {f"std_{i}": float(s) for i, s in enumerate(std)}
  )
