"""What the training of both picture tokenizers has in common."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8
from rich import progress

from fusionlab.config import option
from fusionlab.errors import UserError
from fusionlab.tokenizers.autoencoder import AutoencoderConfig

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainConfig:
  """How the convolutions of a picture tokenizer are trained."""

  num_steps: int = option(4000, "optimizer steps", minimum=1)
  batch_size: int = option(16, "pictures per step", minimum=1)
  learning_rate: float = option(2e-3, "Adam's, cosine to 0", minimum=0.0)
  clip_norm: float = option(1.0, "gradient norm bound", minimum=0.0)
  mse: float = option(0.7, "weight of the squared error", minimum=0.0)
  l1: float = option(0.3, "weight of the absolute error", minimum=0.0)
  shift: int = option(3, "pictures move by up to this many pixels", minimum=0)
  flip: float = option(
    0.5, "probability of a mirrored picture", minimum=0.0, maximum=1.0
  )
  permute: float = option(
    0.2, "probability of permuted colour channels", minimum=0.0, maximum=1.0
  )
  seed: int = option(
    0, "of weights, order, augmentation and what else is random", minimum=0
  )


def make_optimizer(
  config: AutoencoderTrainConfig,
) -> optax.GradientTransformation:
  """Adam with clipped gradients; the learning rate falls as a cosine to 0."""
  schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule)
  )


def augment(
  images: Float[Array, "B S S 3"],
  key: jax.Array,
  config: AutoencoderTrainConfig,
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


def order(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
  """Yields indices of batches for ever, each epoch in an order of its own."""
  epoch, left = 0, np.zeros(0, np.int64)
  while True:
    while len(left) < batch_size:
      shuffled = np.random.default_rng([seed, epoch]).permutation(count)
      left, epoch = np.concatenate([left, shuffled]), epoch + 1
    yield left[:batch_size]
    left = left[batch_size:]


def check_pictures(
  images: UInt8[np.ndarray, "N H W 3"], sizes: AutoencoderConfig, what: str
) -> None:
  """Refuses pictures that a tokenizer cannot learn from.

  Args:
    images: all of them.
    sizes: of the tokenizer.
    what: its kind, for the message.

  Raises:
    UserError: no pictures, or pictures of another size.
  """
  shape = (sizes.image_size, sizes.image_size, 3)
  if not len(images) or images.shape[1:] != shape:
    raise UserError(
      f"{what}: the pictures are {list(images.shape)}, they must be"
      f" [N, {shape[0]}, {shape[0]}, 3] with N > 0; set image_size or sources"
    )


def run_steps(
  step: Callable[[State, np.ndarray], tuple[State, dict]],
  state: State,
  images: UInt8[np.ndarray, "N S S 3"],
  config: AutoencoderTrainConfig,
  what: str,
  shown: dict[str, str],
) -> State:
  """Takes exactly `config.num_steps` steps, with a progress bar.

  Args:
    step: (state, pictures) -> (state, metrics), of which one is "loss".
    state: before the first step.
    images: the pictures to learn from.
    config: steps, batch size and the seed of the order.
    what: is trained, for the bar and for messages.
    shown: metrics that the bar shows, and how: {"mse": "mse {:.4f}"}.

  Raises:
    UserError: a loss that is not finite.
  """
  batches = order(len(images), config.batch_size, config.seed)
  columns = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(*columns) as bar:
    task = bar.add_task(what, total=config.num_steps)
    for i in range(config.num_steps):
      state, metrics = step(state, images[next(batches)])
      if i % 50 == 0 or i + 1 == config.num_steps:
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
          raise UserError(
            f"{what}: the loss is {loss} at step {i};"
            f" try a smaller learning_rate than {config.learning_rate}"
          )
        text = " ".join(f.format(float(metrics[k])) for k, f in shown.items())
        bar.update(task, completed=i + 1, description=text)
        if not bar.console.is_terminal and i % 500 == 0:
          print(f"step {i}: {text}", flush=True)
  return state


def reconstruction(
  images: UInt8[np.ndarray, "N S S 3"], decoded: UInt8[np.ndarray, "N S S 3"]
) -> dict[str, float]:
  """Errors of decoded pictures.

  Returns:
    "pictures"; "mse" and "l1" of pixels in 0..1; "psnr" in dB, of the mean
    squared error, and "psnr_median" over pictures.
  """
  error = (decoded.astype(np.float32) - images) / 255
  per_picture = np.maximum((error**2).mean((1, 2, 3)), 1e-10)
  return {
    "pictures": len(images),
    "mse": float(per_picture.mean()),
    "l1": float(np.abs(error).mean()),
    "psnr": float(-10 * np.log10(per_picture.mean())),
    "psnr_median": float(np.median(-10 * np.log10(per_picture))),
  }
