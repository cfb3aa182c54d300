"""Next tokens and the noise in pictures: the objective of Transfusion.

Source: Transfusion (arXiv 2408.11039), section 3: one transformer, next-token loss
on discrete positions, denoising loss on continuous ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusionlab.batch import Batch, Vocabulary
from fusionlab.config import option
from fusionlab.errors import ConfigError, UserError
from fusionlab.nn.functional.diffusion import Process
from fusionlab.objectives.metrics import Mean
from fusionlab.objectives.next_token import NextToken, NextTokenConfig
from fusionlab.objectives.noise import (
  before_text,
  normal_of_positions,
  normal_of_values,
  uniform_of_spans,
)


@dataclasses.dataclass(frozen=True)
class NextTokenDiffusionConfig(NextTokenConfig):
  """`config.objective` of models of text and continuous pictures."""

  kind: str = option(
    "next_token_diffusion", "registered objective or package.module:Class"
  )
  diffusion_weight: float = option(
    5.0, "lambda, weight of the loss of pictures beside that of text", minimum=0
  )
  flow_time: str = option(
    "uniform",
    "how flow draws its times; logit_normal: mostly from the middle (Esser et"
    " al. 2024, section 3.1)",
    choices=("uniform", "logit_normal"),
  )
  noise_limit: float = option(
    0.5,
    "largest noise level of a picture that stands before its document's text, so"
    " that it can be seen by who describes it (Transfusion, Table 8); 1: no limit",
    minimum=0.0,
    maximum=1.0,
  )
  heldout_times: tuple[float, ...] = option(
    (0.1, 0.3, 0.5, 0.7, 0.9),
    "noise levels at which every held-out picture is scored",
    minimum=0.0,
    maximum=1.0,
  )
  heldout_seed: int = option(0, "seed of the noise of held-out pictures")

  def check(self, path: str) -> None:
    """Refuses times that are none.

    Raises:
      ConfigError: the key, its value and what is allowed.
    """
    self._check_levels(path, 0.0)
    if len(set(self.heldout_times)) < len(self.heldout_times):
      raise ConfigError(
        f"{path}.heldout_times={self.heldout_times} has one twice"
      )

  def check_model(self, path: str, model: Any) -> None:
    """Refuses a model that predicts no noise, and times that its process lacks.

    Raises:
      ConfigError: the key, its value and what is allowed.
    """
    process = getattr(model, "process", None)
    if process is None:
      raise ConfigError(
        f"{path}.kind={self.kind!r} needs a model that predicts noise, which"
        f" config.model.kind={model.kind!r} does not; set it to 'transfusion'"
      )
    if process == "ddpm":
      self._check_levels(path, 1 / model.num_timesteps)
    if process != "flow" and self.flow_time != "uniform":
      raise ConfigError(
        f"{path}.flow_time={self.flow_time!r} is of config.model.process='flow';"
        f" config.model.process={process!r} draws its timesteps evenly"
      )

  def _check_levels(self, path: str, least: float) -> None:
    for key in ("noise_limit", "heldout_times"):
      value = getattr(self, key)
      low = min(value, default=0.0) if isinstance(value, tuple) else value
      if low < least or low == 0:
        raise ConfigError(
          f"{path}.{key}={value!r} must be noise levels above 0"
          f"{f' and at least {least:g}, one timestep' if least else ''}"
        )


def _inside(batch: Batch) -> jax.Array:
  """Positions [B, L] of continuous spans."""
  return jnp.asarray(batch.span) > 0


class NextTokenDiffusion(NextToken):
  """mean over next tokens of their loss + lambda · mean over pictures of theirs.

  A picture's loss is the mean square, over all of its values, of the error of what
  the model predicts of its noise. A picture has one noise level.

  In training levels are drawn: timesteps 1..T evenly for ddpm, (0, 1] for flow.
  Held-out, every picture is scored at each of `heldout_times` with noise that
  depends on its own values and `heldout_seed` alone, so that models, batches and
  splits with and without captions are compared on the same; text is scored beside
  clean pictures, as who describes one sees it. That is one pass through the model
  a level and one more.
  """

  Config = NextTokenDiffusionConfig

  def __init__(
    self,
    config: NextTokenDiffusionConfig,
    vocabulary: Vocabulary,
    token_bytes: np.ndarray,
  ):
    super().__init__(config, vocabulary, token_bytes)
    if not vocabulary.continuous:
      raise UserError(
        f"the objective {config.kind!r} needs a continuous modality, and"
        f" {', '.join(vocabulary.modalities)} are all discrete; set"
        f" config.data.image_tokenizer to one that gives latents ('kl'), or"
        f" config.objective.kind='next_token'"
      )
    self.config: NextTokenDiffusionConfig = config

  def balance(self, batch: Batch) -> Batch:
    """Weighs pictures so that the sum of both means is one mean over the step.

    Args:
      batch: all rows of a step.

    Returns:
      The batch whose weights of patches sum to lambda times those of next tokens
      (times 1 where there are none).
    """
    inside = _inside(batch)
    return dataclasses.replace(
      batch,
      weight=jnp.where(inside, self._factor(batch), 1.0) * batch.weight,
    )

  def _factor(self, batch: Batch) -> jax.Array:
    inside = _inside(batch)
    tokens = jnp.where(inside, 0.0, batch.weight).sum()
    pictures = jnp.where(inside, batch.weight, 0.0).sum()
    factor = self.config.diffusion_weight * jnp.maximum(tokens, 1.0)
    return jnp.where(pictures > 0, factor / pictures, 1.0)

  def __call__(
    self,
    model: Any,
    params: Any,
    batch: Batch,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
  ) -> dict[str, Mean]:
    """Runs the model on noisy pictures and scores what it predicts.

    Args:
      model: has `unembedding`, `process`, and `apply` that takes `denoise=True`.
      params: its parameters.
      batch: rows of packed documents with clean latents; in training, of a batch
        that `balance` returned, as `make_train_step` has it.
      train: whether noise levels are drawn and dropout acts.
      dropout_key: for noise levels, noise and dropout; needed in training.

    Returns:
      What `NextToken` returns of the discrete modalities; per continuous modality
      m "loss/m", "tokens/m" (patches) and, at each of `heldout_times` "mse/m/t0.1",
      …, in training of the pictures whose level is nearest to it; "pictures" of a
      call. "loss" is the sum.

    Raises:
      UserError: training without a key.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    if not train:
      return self._heldout(model, params, batch)
    if dropout_key is None:
      raise UserError(
        f"the objective {self.config.kind!r} draws noise in training: give"
        f" dropout_key (make_train_step: dropout_seed)"
      )
    if self.config.word_dropout:
      batch = self._drop_words(batch, jax.random.fold_in(dropout_key, 1))
    key = jax.random.fold_in(dropout_key, 2)
    time, noise = self._draw(model.process, batch, key)
    rngs = {"dropout": dropout_key}
    hidden, error = self.denoise(
      model, params, batch, time, noise, train=True, rngs=rngs
    )
    means = self._score(model, params, hidden, batch)
    weight = jnp.where(_inside(batch), batch.weight, 0.0)
    levels = jnp.asarray(self.config.heldout_times, jnp.float32)
    nearest = jnp.abs(time - levels[:, None, None]).argmin(axis=0)
    per = weight * (nearest == jnp.arange(len(levels))[:, None, None])
    of = self._of_modalities(batch)
    totals = jnp.einsum("mbl,tbl->mt", of, per * error)
    counts = jnp.einsum("mbl,tbl->mt", of, per)
    return means | self._means(means["loss"], batch, 1.0, totals, counts)

  def _heldout(self, model: Any, params: Any, batch: Batch) -> dict[str, Mean]:
    inside = _inside(batch)
    noise = normal_of_values(self.config.heldout_seed, batch)
    # The first pass, of clean pictures, is for the text.
    levels = jnp.asarray((0.0, *self.config.heldout_times), jnp.float32)
    weight = jnp.where(inside, batch.weight, 0.0)
    of = self._of_modalities(batch)

    def run(i):
      time = jnp.where(inside, levels[i], 0.0)
      hidden, error = self.denoise(model, params, batch, time, noise)
      return hidden, jnp.einsum("mbl,bl->m", of, weight * error)

    def body(i, carry):
      hidden, totals = carry
      new, total = run(i)
      return jnp.where(i == 0, new, hidden), totals.at[:, i].set(total)

    hidden = jax.eval_shape(run, 0)[0]
    carry = (
      jnp.zeros(hidden.shape, hidden.dtype),
      jnp.zeros((len(of), len(levels)), jnp.float32),
    )
    # One program for all passes; without a picture there is one.
    passes = jnp.where(inside.any(), len(levels), 1)
    hidden, totals = jax.lax.fori_loop(0, passes, body, carry)
    means = self._score(model, params, hidden, batch)
    # Each level is a part of the whole, as in training.
    totals = totals[:, 1:] / (len(levels) - 1)
    count = jnp.einsum("mbl,bl->m", of, weight) / (len(levels) - 1)
    counts = jnp.broadcast_to(count[:, None], totals.shape)
    factor = self._factor(batch)
    return means | self._means(means["loss"], batch, factor, totals, counts)

  def _means(
    self,
    text: Mean,
    batch: Batch,
    factor: jax.Array | float,
    totals: jax.Array,
    counts: jax.Array,
  ) -> dict[str, Mean]:
    """Metrics from sums [M, levels] of pictures' errors and of their weights."""
    one = jnp.ones((), jnp.float32)
    pictures = jnp.asarray(batch.span).max(axis=1).sum().astype(jnp.float32)
    means = {
      "loss": Mean(text.total + factor * totals.sum(), text.count),
      "pictures": Mean(pictures, one),
    }
    of = self._of_modalities(batch)
    for i, m in enumerate(self.vocabulary.continuous):
      name = self.vocabulary.modalities[m]
      means[f"loss/{name}"] = Mean(totals[i].sum(), counts[i].sum())
      means[f"tokens/{name}"] = Mean(of[i].sum(), one)
      for j, level in enumerate(self.config.heldout_times):
        means[f"mse/{name}/t{level:g}"] = Mean(totals[i, j], counts[i, j])
    return means

  def _of_modalities(self, batch: Batch) -> jax.Array:
    """Float32 [M, B, L], the positions of each continuous modality."""
    ids = jnp.asarray(self.vocabulary.continuous)[:, None, None]
    return ((batch.modality == ids) & _inside(batch)).astype(jnp.float32)

  def denoise(
    self,
    model: Any,
    params: Any,
    batch: Batch,
    time: Float[Array, "B L"],
    noise: Float[Array, "B L C"],
    **options: Any,
  ) -> tuple[Float[Array, "B L d"], Float[Array, "B L"]]:
    """Runs the model on noisy pictures.

    Args:
      model: see `__call__`.
      params: its parameters.
      batch: rows with clean latents.
      time: noise levels, float32, one a picture; at 0 it stays clean.
      noise: float32.
      **options: of `model.apply`.

    Returns:
      Hidden states, and the mean square error of what is predicted of each
      patch, float32, 0 at other positions.
    """
    inside, clean = _inside(batch), jnp.asarray(batch.latents)
    noisy = model.process.noisy(clean, noise, time)
    seen = jnp.where(inside[..., None], noisy, 0.0)
    hidden, prediction = model.apply(
      {"params": params},
      dataclasses.replace(batch, latents=seen, time=time),
      denoise=True,
      **options,
    )
    target = model.process.target(clean, noise)
    error = jnp.square(prediction.astype(jnp.float32) - target).mean(axis=-1)
    return hidden, jnp.where(inside, error, 0.0)

  def _draw(
    self, process: Process, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Noise levels [B, L], one a picture, 0 elsewhere; noise [B, L, C]."""
    config = self.config
    of_times, of_noise = jax.random.split(key)
    time = uniform_of_spans(of_times, batch)
    first = before_text(batch, self.vocabulary)
    limit = jnp.where(first, config.noise_limit, 1.0)
    if process.kind == "ddpm":
      last = jnp.floor(limit * process.num_timesteps + 1e-3)
      time = jnp.clip(jnp.ceil(time * last), 1, last) / process.num_timesteps
    elif config.flow_time == "logit_normal":
      time = limit * jax.nn.sigmoid(jax.scipy.special.ndtri(time))
    else:
      time = limit * time
    time = jnp.where(_inside(batch), time, 0.0)
    return time, normal_of_positions(of_noise, batch)
