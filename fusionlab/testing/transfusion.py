"""Reference vectors `transfusion` through the library's batches and objective.

They are of a public implementation (Transfusion's authors gave none), with other
conventions, which are converted here:

  time    1 is data there and 0 here; its velocity points to the data.
  loss    there each mean is weighted by its share of all positions, and that of a
          modality is over all values, however many each picture has.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.batch import (
  Batch,
  LatentGrid,
  Vocabulary,
  packed_batch,
)
from fusionlab.errors import UserError
from fusionlab.intervals import causal_intervals, continuous_spans
from fusionlab.nn.functional.diffusion import Process
from fusionlab.objectives.diffusion import (
  NextTokenDiffusion,
  NextTokenDiffusionConfig,
)

# What the library does otherwise, on purpose.
_ROTARY = "a span's positions share one there; here they count on"
_TIMES = "a row's spans share two levels there; here each draws its own"

Pairs = dict[str, tuple[Any, Any] | str]


def transfusion_case(case: Mapping[str, np.ndarray]) -> Pairs:
  """Ours and theirs by quantity, or why there is no ours.

  Args:
    case: arrays by name, without the case's prefix.

  Raises:
    UserError: a case of a kind that is not known.
  """
  if "attn_mask" in case:
    return _masks(case)
  if "ce/labels" in case:
    return _losses(case)
  if "rand0" in case:
    return {"times": _TIMES}
  raise UserError(f"{', '.join(case)} are not of masks, losses or times")


def _masks(case: Mapping[str, np.ndarray]) -> Pairs:
  """What may be seen, which positions are of which span, and their order."""
  given, length = case["modalities"], int(case["seq_len"])
  rows = len(given)
  modality = np.zeros((rows, length), np.int32)
  for row in range(rows):
    for kind, offset, size in given[row]:
      modality[row, offset : offset + size] = kind + 1
  segment = np.ones_like(modality)
  position = np.broadcast_to(np.arange(length, dtype=np.int32), modality.shape)
  k_start, k_end = causal_intervals(segment, position)
  # Ours have a <boi> between them; these touch where the modality changes.
  span, _, end = continuous_spans(modality > 0, modality)
  k_end = np.where(span > 0, end, k_end)
  column = np.arange(length)
  seen = (column >= k_start[..., None]) & (column < k_end[..., None])
  of_kind = np.zeros_like(case["is_modality_mask"])
  ordered = np.zeros_like(given)
  for row in range(rows):
    for number in range(1, span[row].max() + 1):
      (places,) = np.nonzero(span[row] == number)
      kind = modality[row, places[0]] - 1
      found = (kind, places[0], len(places))
      ordered[row, number - 1] = found
      listed = (given[row] == found).all(axis=1)
      of_kind[row, kind, listed] = span[row] == number
  return {
    "attn_mask": (seen, case["attn_mask"]),
    "is_modality_mask": (of_kind, case["is_modality_mask"]),
    "ordered": (ordered, case["ordered"]),
    "rotary_positions": _ROTARY,
  }


class _Recorded:
  """A model that says what was recorded of another."""

  process = Process("flow")

  def __init__(self, logits: np.ndarray, prediction: np.ndarray, ids: int):
    # A last feature of 1 takes ids that the other lacks out of the softmax.
    rows, length, width = logits.shape
    hidden = np.concatenate([logits, np.ones((rows, length, 1))], axis=-1)
    # The last position has no target, and none was recorded.
    self._hidden = jnp.asarray(
      np.pad(hidden, ((0, 0), (0, 1), (0, 0))), jnp.float32
    )
    table = np.zeros((width + 1, ids), np.float32)
    table[:width, :width] = np.eye(width)
    table[width, width:] = -1e4
    self._table, self._prediction = jnp.asarray(table), jnp.asarray(prediction)

  def apply(self, *_: Any, **__: Any) -> tuple[jax.Array, jax.Array]:
    """Hidden states, which are logits, and the prediction."""
    return self._hidden, self._prediction

  def unembedding(self, _: Any) -> jax.Array:
    """The table that leaves logits as they are."""
    return self._table


class _RecordedDraw(NextTokenDiffusion):
  """The objective with noise levels and noise that were recorded."""

  drawn: tuple[jax.Array, jax.Array]

  def _draw(
    self, process: Process, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    del process, batch, key
    return self.drawn


def _losses(case: Mapping[str, np.ndarray]) -> Pairs:
  """Labels, targets, and the losses of recorded logits and predictions."""
  labels, logits = case["ce/labels"], case["ce/logits_b_l_n"].swapaxes(1, 2)
  text = logits.shape[-1]
  # Position j + 1 is label j. Of a span no position is known, nor what follows it.
  known = np.pad(labels >= 0, ((0, 0), (1, 0)), constant_values=True)
  real = np.cumsum(known[:, ::-1], axis=1)[:, ::-1] > 0
  after = np.pad(known, ((0, 0), (0, 1)), constant_values=True)[:, 1:]
  patch = real & ~known & ~after
  spans = _spans(case)
  kind_of = np.concatenate([[kind] * len(x) for kind, x, _, _ in spans])
  tokens = np.pad(labels, ((0, 0), (1, 0))).clip(0).astype(np.int32)
  kinds = np.unique(kind_of)
  tokens[patch] = text + np.searchsorted(kinds, kind_of)
  position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  pairs: Pairs = {}
  total = 0.0
  for index, kind in enumerate(kinds):
    mine = tokens == text + index
    own = [span for span in spans if span[0] == kind]
    prediction = case[f"mse{kind}/pred"]
    width = prediction.shape[-1]
    grid = LatentGrid(side=1, channels=width)
    vocabulary = Vocabulary(
      ("text", *(f"mod{k}" for k in kinds)),
      (text, *(1 for _ in kinds)),
      grids=(None, *(grid for _ in kinds)),
    )

    def place(values, width=width, mine=mine):
      placed = np.zeros((*tokens.shape, width), np.float32)
      placed[mine] = values
      return placed

    batch = packed_batch(
      tokens,
      real.astype(np.int32),
      np.where(real, position, 0).astype(np.int32),
      vocabulary,
      latents=place(np.concatenate([x for _, x, _, _ in own])),
    )
    time = [[[1 - t]] * len(x) for _, x, _, t in own]
    noise = jnp.asarray(place(np.concatenate([eps for _, _, eps, _ in own])))
    language = np.where(patch, 0, batch.weight)
    batch = dataclasses.replace(
      batch, weight=np.where(mine, 1, language).astype(np.float32)
    )
    config = NextTokenDiffusionConfig(
      z_loss=0.0,
      diffusion_weight=float(mine.sum() / language.sum()),
    )
    objective = _RecordedDraw(config, vocabulary, np.ones(text, np.int32))
    level = place(np.concatenate(time))[..., 0]
    objective.drawn = (jnp.asarray(level), noise)
    model = _Recorded(logits, -place(prediction), vocabulary.size)
    means = objective(
      model,
      {},
      objective.balance(batch),
      train=True,
      dropout_key=jax.random.key(0),
    )
    target = model.process.target(jnp.asarray(batch.latents), noise)
    scored = np.where(language > 0, batch.target, -1)[:, :-1]
    pairs |= {
      "ce/labels": (scored, labels),
      "text_loss": (means["loss/text"].value(), case["text_loss"]),
      f"mse{kind}/target": (-target[mine], case[f"mse{kind}/target"]),
      f"flow_loss_{kind}": (
        means[f"loss/mod{kind}"].value(),
        case[f"flow_loss_{kind}"],
      ),
    }
    # Each "loss" has that of text, which is to count once.
    once = means["loss/text"].value() if index else 0.0
    total += (means["loss"].value() - once) * language.sum() / real.sum()
  pairs["total_loss"] = (total, case["total_loss"])
  return pairs


def _spans(
  case: Mapping[str, np.ndarray],
) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
  """Type, data, noise and time of each span, in order of rows and places."""
  names = (re.fullmatch(r"data/b(\d+)_(\d+)_mod(\d+)", name) for name in case)
  found = sorted((int(m[1]), int(m[2]), int(m[3])) for m in names if m)
  spans, of_row = [], {}
  for number, (row, place, kind) in enumerate(found):
    nth = of_row[row] = of_row.get(row, -1) + 1
    data = case[f"data/b{row}_{place}_mod{kind}"]
    noise, time = case[f"noise_call_{number}"], case["times"][row, nth]
    spans.append((kind, data, noise, float(time)))
  return spans
