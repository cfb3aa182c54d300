"""Training of picture codes: one pure step, a loop, a report.

The codebook follows its latents by moving averages and unused codes are
revived from the batch: van den Oord et al. 2017, arXiv:1711.00937, appendix
A.1; revival as in Dhariwal et al. 2020 (Jukebox), arXiv:2005.00341, §3.1.
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
  ImageConfig,
  init_params,
  latents_of,
  nearest_code,
  pixels_of,
)
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.training import (
  AutoencoderTrainConfig,
  augment,
  check_pictures,
  make_optimizer,
  reconstruction,
  run_steps,
)


@dataclasses.dataclass(frozen=True)
class ImageTrainConfig(AutoencoderTrainConfig):
  """How the tokenizer of picture codes is trained."""

  commitment: float = option(
    0.1, "weight of the latents' squared distance to their codes", minimum=0.0
  )
  codebook_decay: float = option(
    0.98, "of the moving averages behind the codes", minimum=0.0, maximum=1.0
  )
  dead_below: float = option(
    0.03, "a code with fewer latents per step than this is dead", minimum=0.0
  )
  revive_until: float = option(
    0.8,
    "fraction of the steps in which dead codes are revived",
    minimum=0.0,
    maximum=1.0,
  )


@flax.struct.dataclass
class State:
  """Everything a step changes.

  Attributes:
    params: weights of encoder and decoder.
    optimizer: Adam's moments.
    codebook: code vectors.
    counts: moving average of the latents per step that chose each code.
    sums: moving average of those latents' sum.
    step: steps done.
  """

  params: dict
  optimizer: optax.OptState
  codebook: Float[Array, "K D"]
  counts: Float[Array, "K"]
  sums: Float[Array, "K D"]
  step: Int[Array, ""]


def init_state(sizes: ImageConfig, config: ImageTrainConfig) -> State:
  """Returns the state before the first step; all codes are still dead."""
  params = init_params(sizes, jax.random.key(config.seed))
  shape = (sizes.codebook_size, sizes.code_dim)
  return State(
    params=params,
    optimizer=make_optimizer(config).init(params),
    codebook=jnp.zeros(shape),
    counts=jnp.zeros(shape[0]),
    sums=jnp.zeros(shape),
    step=jnp.zeros((), jnp.int32),
  )


def revive(
  state: State,
  latents: Float[Array, "n D"],
  key: jax.Array,
  dead_below: float | Float[Array, ""],
) -> State:
  """Gives every dead code the place of a latent of this batch, at random.

  Args:
    state: codes, counts and sums.
    latents: what the encoder made of the batch.
    key: picks the latents.
    dead_below: a code with a smaller count is dead.

  Returns:
    The state with a count of 1 for each revived code; others are untouched.
  """
  size, number = len(state.counts), len(latents)
  chosen = latents[
    jax.random.choice(key, number, (size,), replace=number < size)
  ]
  dead = state.counts < dead_below
  return dataclasses.replace(
    state,
    codebook=jnp.where(dead[:, None], chosen, state.codebook),
    counts=jnp.where(dead, 1.0, state.counts),
    sums=jnp.where(dead[:, None], chosen, state.sums),
  )


def follow(
  state: State,
  latents: Float[Array, "n D"],
  codes: Int[Array, "n"],
  decay: float,
) -> State:
  """Moves each code to the moving mean of the latents that chose it."""
  chosen = jax.nn.one_hot(codes, len(state.counts))
  counts = decay * state.counts + (1 - decay) * chosen.sum(0)
  sums = decay * state.sums + (1 - decay) * chosen.T @ latents
  # A code that nobody chooses keeps its place while its count fades to 0.
  used = counts > 1e-6
  means = sums / jnp.where(used, counts, 1.0)[:, None]
  codebook = jnp.where(used[:, None], means, state.codebook)
  return dataclasses.replace(state, codebook=codebook, counts=counts, sums=sums)


def make_train_step(
  sizes: ImageConfig, config: ImageTrainConfig
) -> Callable[[State, UInt8[Array, "B S S 3"]], tuple[State, dict]]:
  """Returns `step(state, images) -> (state, metrics)`, pure and jit-able.

  Metrics are float32 scalars: "loss", "mse" and "l1" (of pixels in 0..1),
  "commitment", and "perplexity", the exponential of the entropy of the codes'
  moving frequencies. Randomness depends on the seed and `state.step` alone.
  """
  optimizer = make_optimizer(config)
  last_revival = int(config.revive_until * config.num_steps)

  def step(state, images):
    root = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_key, revive_key = jax.random.split(root)
    pixels = augment(images.astype(jnp.float32) / 255, augment_key, config)

    def loss_of(params):
      latents = latents_of(sizes, params, pixels)
      flat = jax.lax.stop_gradient(latents).reshape(-1, sizes.code_dim)
      threshold = jnp.where(state.step < last_revival, config.dead_below, -1.0)
      revived = revive(state, flat, revive_key, threshold)
      codes = nearest_code(flat, revived.codebook)
      vectors = revived.codebook[codes].reshape(latents.shape)
      commitment = ((latents - vectors) ** 2).mean()
      # The gradient passes the choice of a code as if it were the identity.
      passed = latents + jax.lax.stop_gradient(vectors - latents)
      output = pixels_of(sizes, params, passed)
      error = output - pixels
      mse, l1 = (error**2).mean(), jnp.abs(error).mean()
      loss = config.mse * mse + config.l1 * l1 + config.commitment * commitment
      metrics = {"loss": loss, "mse": mse, "l1": l1, "commitment": commitment}
      moved = follow(revived, flat, codes, config.codebook_decay)
      return loss, (moved, metrics)

    gradient, (moved, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    metrics["perplexity"] = perplexity(moved.counts)
    new_state = dataclasses.replace(
      moved,
      params=optax.apply_updates(state.params, updates),
      optimizer=moments,
      step=state.step + 1,
    )
    return new_state, metrics

  return step


@functools.cache
def _compiled_step(sizes: ImageConfig, config: ImageTrainConfig) -> Callable:
  return jax.jit(make_train_step(sizes, config), donate_argnums=0)


def perplexity(counts: Float[Array, "K"]) -> Float[Array, ""]:
  """exp(entropy) of the frequencies: the number of codes in even use."""
  p = counts / jnp.maximum(counts.sum(), 1e-20)
  return jnp.exp(-(p * jnp.log(jnp.maximum(p, 1e-20))).sum())


def train(
  images: UInt8[np.ndarray, "N S S 3"],
  sizes: ImageConfig,
  config: ImageTrainConfig,
  notes: dict | None = None,
) -> ImageTokenizer:
  """Trains a tokenizer for exactly `config.num_steps` steps.

  Args:
    images: the pictures to learn from, of `sizes.image_size`.
    sizes: of the tokenizer.
    config: of the training.
    notes: JSON-ready; kept in the tokenizer's file.

  Raises:
    UserError: no pictures, another size, or a loss that is not finite.
  """
  what = ImageTokenizer.kind
  check_pictures(images, sizes, what)
  shown = {"mse": "mse {:.4f}", "l1": "l1 {:.4f}", "perplexity": "codes {:.0f}"}
  step = _compiled_step(sizes, config)
  state = run_steps(
    step, init_state(sizes, config), images, config, what, shown
  )
  return ImageTokenizer.from_params(sizes, state.params, state.codebook, notes)


def measure(
  tokenizer: ImageTokenizer, images: UInt8[np.ndarray, "N S S 3"]
) -> dict[str, float]:
  """Reconstruction error and codebook use on pictures, not augmented.

  Returns:
    What `reconstruction` gives; "codes_used"; "perplexity".
  """
  codes = tokenizer.encode(images)
  counts = np.bincount(codes.ravel(), minlength=tokenizer.codebook_size)
  return reconstruction(images, tokenizer.decode(codes)) | {
    "codes_used": int((counts > 0).sum()),
    "perplexity": float(perplexity(jnp.asarray(counts, jnp.float32))),
  }
