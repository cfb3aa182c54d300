"""Held-out loss per modality, over every split and over all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fusionlab.batch import Batch
from fusionlab.sharding.batches import place_batch
from fusionlab.tokenizers import Tokenizers
from fusionlab.train.metrics import Row, add_sums, averages

# Batches whose sums may still be on their way when the next one is sent.
_IN_FLIGHT = 2


class Interrupted(Exception):
  """An evaluation was asked to stop; nothing of it is reported."""


class CaptionWorth(NamedTuple):
  """How what a caption saves of its picture's loss is reported.

  Attributes:
    name: of the metric.
    factor: of the difference of the mean losses.
  """

  name: str
  factor: float


def caption_worth(tokenizers: Tokenizers) -> CaptionWorth:
  """Nats per picture where it is codes, else mean squared error.

  Args:
    tokenizers: of the run.
  """
  if tokenizers.vocabulary.continuous:
    return CaptionWorth("caption_mse_gain", 1.0)
  codes = tokenizers.block_lengths[-1]
  return CaptionWorth("caption_nats_per_picture", codes)


def loader_sums(
  eval_step: Callable[[Any, Batch], Mapping[str, Any]],
  params: Any,
  loader: Any,
  mesh: Mesh,
  *,
  limit: int = 0,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray]:
  """Sums the objective's Means over a held-out loader.

  Args:
    eval_step: see `fusionlab.train.step.make_eval_step`.
    params: the parameters to score.
    loader: `len` and random access give its batches.
    mesh: the devices.
    limit: batches at most; 0: all.
    should_stop: asked before each batch.

  Returns:
    metric -> float64 [total, count].

  Raises:
    Interrupted: `should_stop` said so.
  """
  sums: dict[str, np.ndarray] = {}
  pending: list[Mapping[str, Any]] = []
  batches = min(limit or len(loader), len(loader))
  for index in range(batches):
    if should_stop():
      raise Interrupted
    pending.append(eval_step(params, place_batch(loader[index], mesh)))
    if len(pending) > _IN_FLIGHT:
      add_sums(sums, jax.device_get(pending.pop(0)))
  for means in pending:
    add_sums(sums, jax.device_get(means))
  return sums


def _saved(
  captioned: Mapping[str, np.ndarray],
  bare: Mapping[str, np.ndarray],
  prefix: str,
  caption: CaptionWorth,
) -> Row:
  """Image loss of pictures without their captions, minus with them."""
  (with_total, with_count), (bare_total, bare_count) = (
    sums.get("loss/image", np.zeros(2)) for sums in (captioned, bare)
  )
  if not with_count or not bare_count:
    return {}
  mean = bare_total / bare_count - with_total / with_count
  return {f"{prefix}{caption.name}": float(mean * caption.factor)}


def evaluate(
  eval_step: Callable[[Any, Batch], Mapping[str, Any]],
  params: Any,
  heldout: Mapping[str, Any],
  uncaptioned: Mapping[str, Any],
  mesh: Mesh,
  *,
  caption: CaptionWorth,
  limit: int = 0,
  should_stop: Callable[[], bool] = lambda: False,
) -> Row:
  """Scores every held-out split.

  What a caption saves is (sum of the image loss without the caption - with it) /
  pictures: nats, or of continuous pictures the denoising error. Both loaders hold
  the same pictures; under a `limit` the two sums may reach a few different ones,
  so each is divided by its own pictures and the value is an estimate.

  Args:
    eval_step: see `fusionlab.train.step.make_eval_step`.
    params: the parameters to score.
    heldout: split -> loader, captions first.
    uncaptioned: split -> loader of the same pictures without captions.
    mesh: the devices.
    caption: see `caption_worth`.
    limit: batches of each loader at most; 0: all.
    should_stop: asked before each batch.

  Returns:
    `eval/loss/text`, `eval/<split>/loss/image`,
    `eval/<split>/caption_nats_per_picture`, …, and `perf/eval_s`. Of continuous
    pictures `loss/image` is the mean squared error of the predicted noise,
    `mse/image/t0.1`, … are its parts by noise level, and `caption_mse_gain` is
    what captions save of it.

  Raises:
    Interrupted: `should_stop` said so.
  """
  start = time.monotonic()
  row: Row = {}
  pooled: tuple[dict, dict, dict] = ({}, {}, {})
  for split, loader in heldout.items():
    options = {"limit": limit, "should_stop": should_stop}
    captioned = loader_sums(eval_step, params, loader, mesh, **options)
    row.update(averages(captioned, f"eval/{split}/"))
    _pool(pooled[0], captioned)
    if split not in uncaptioned:
      continue
    bare = loader_sums(eval_step, params, uncaptioned[split], mesh, **options)
    _pool(pooled[1], captioned)
    _pool(pooled[2], bare)
    row.update(_saved(captioned, bare, f"eval/{split}/", caption))
  row.update(averages(pooled[0], "eval/"))
  row.update(_saved(pooled[1], pooled[2], "eval/", caption))
  row["perf/eval_s"] = time.monotonic() - start
  return row


def _pool(into: dict[str, np.ndarray], sums: Mapping[str, np.ndarray]) -> None:
  for name, pair in sums.items():
    into[name] = into.get(name, np.zeros(2)) + pair
