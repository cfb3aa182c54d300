"""Training of the picture tokenizer: one pure step, a loop, a report.

The codebook follows its latents by moving averages and unused codes are
revived from the batch: van den Oord et al. 2017, arXiv:1711.00937, appendix
A.1; revival as in Dhariwal et al. 2020 (Jukebox), arXiv:2005.00341, §3.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from rich import progress

from fusionlab.config import option
from fusionlab.errors import UserError
from fusionlab.tokenizers.autoencoder import (
  ImageConfig,
  init_params,
  latents_of,
  nearest_code,
  pixels_of,
)
from fusionlab.tokenizers.image import ImageTokenizer


@dataclasses.dataclass(frozen=True)
class ImageTrainConfig:
  """How the picture tokenizer is trained."""

  num_steps: int = option(4000, "optimizer steps", minimum=1)
  batch_size: int = option(16, "pictures per step", minimum=1)
  learning_rate: float = option(2e-3, "Adam's, cosine to 0", minimum=0.0)
  clip_norm: float = option(1.0, "gradient norm bound", minimum=0.0)
  mse: float = option(0.7, "weight of the squared error", minimum=0.0)
  l1: float = option(0.3, "weight of the absolute error", minimum=0.0)
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
  shift: int = option(3, "pictures move by up to this many pixels", minimum=0)
  flip: float = option(
    0.5, "probability of a mirrored picture", minimum=0.0, maximum=1.0
  )
  permute: float = option(
    0.2, "probability of permuted colour channels", minimum=0.0, maximum=1.0
  )
  seed: int = option(0, "of weights, order and augmentation", minimum=0)


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


def _optimizer(config: ImageTrainConfig) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule)
  )


def init_state(sizes: ImageConfig, config: ImageTrainConfig) -> State:
  """Returns the state before the first step; all codes are still dead."""
  params = init_params(sizes, jax.random.key(config.seed))
  shape = (sizes.codebook_size, sizes.code_dim)
  return State(
    params=params,
    optimizer=_optimizer(config).init(params),
    codebook=jnp.zeros(shape),
    counts=jnp.zeros(shape[0]),
    sums=jnp.zeros(shape),
    step=jnp.zeros((), jnp.int32),
  )


def augment(
  images: Float[Array, "B S S 3"], key: jax.Array, config: ImageTrainConfig
) -> Float[Array, "B S S 3"]:
  """Mirrors, moves (around the border) and recolours each picture at random."""

  def one(image, key):
    flip, shift, permute, order = jax.random.split(key, 4)
    mirrored = jax.random.bernoulli(flip, config.flip)
    image = jnp.where(mirrored, image[:, ::-1], image)
    moves = jax.random.randint(shift, (2,), -config.shift, config.shift + 1)
    image = jnp.roll(image, moves, (0, 1))
    recoloured = jax.random.bernoulli(permute, config.permute)
    channels = jax.random.permutation(order, 3)
    return jnp.where(recoloured, image[..., channels], image)

  return jax.vmap(one)(images, jax.random.split(key, len(images)))


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
  optimizer = _optimizer(config)
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


def order(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
  """Yields indices of batches for ever, each epoch in an order of its own."""
  epoch, left = 0, np.zeros(0, np.int64)
  while True:
    while len(left) < batch_size:
      shuffled = np.random.default_rng([seed, epoch]).permutation(count)
      left, epoch = np.concatenate([left, shuffled]), epoch + 1
    yield left[:batch_size]
    left = left[batch_size:]


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
  shape = (sizes.image_size, sizes.image_size, 3)
  if not len(images) or images.shape[1:] != shape:
    raise UserError(
      f"image tokenizer: the pictures are {list(images.shape)}, they must be"
      f" [N, {shape[0]}, {shape[0]}, 3] with N > 0; set image_size or sources"
    )
  state = init_state(sizes, config)
  step = _compiled_step(sizes, config)
  batches = order(len(images), config.batch_size, config.seed)
  columns = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(*columns) as bar:
    task = bar.add_task("image tokenizer", total=config.num_steps)
    for i in range(config.num_steps):
      state, metrics = step(state, images[next(batches)])
      if i % 50 == 0 or i + 1 == config.num_steps:
        shown = {k: float(v) for k, v in metrics.items()}
        if not np.isfinite(shown["loss"]):
          raise UserError(
            f"image tokenizer: the loss is {shown['loss']} at step {i};"
            f" try a smaller learning_rate than {config.learning_rate}"
          )
        text = (
          f"mse {shown['mse']:.4f} l1 {shown['l1']:.4f}"
          f" codes {shown['perplexity']:.0f}"
        )
        bar.update(task, completed=i + 1, description=text)
        if not bar.console.is_terminal and i % 500 == 0:
          print(f"step {i}: {text}", flush=True)
  return ImageTokenizer.from_params(sizes, state.params, state.codebook, notes)


def measure(
  tokenizer: ImageTokenizer, images: UInt8[np.ndarray, "N S S 3"]
) -> dict[str, float]:
  """Reconstruction error and codebook use on pictures, not augmented.

  Returns:
    "pictures"; "mse" and "l1" of pixels in 0..1; "psnr" in dB, of the mean
    squared error, and "psnr_median" over pictures; "codes_used"; "perplexity".
  """
  codes = tokenizer.encode(images)
  error = (tokenizer.decode(codes).astype(np.float32) - images) / 255
  per_picture = np.maximum((error**2).mean((1, 2, 3)), 1e-10)
  counts = np.bincount(codes.ravel(), minlength=tokenizer.codebook_size)
  return {
    "pictures": len(images),
    "mse": float(per_picture.mean()),
    "l1": float(np.abs(error).mean()),
    "psnr": float(-10 * np.log10(per_picture.mean())),
    "psnr_median": float(np.median(-10 * np.log10(per_picture))),
    "codes_used": int((counts > 0).sum()),
    "perplexity": float(perplexity(jnp.asarray(counts, jnp.float32))),
  }
