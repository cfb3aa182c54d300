"""Next-token prediction over the shared vocabulary, per target modality."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.batch import Batch, Vocabulary
from fusionlab.config import option
from fusionlab.objectives.metrics import Mean
from fusionlab.sharding import axes
from fusionlab.sharding.rules import (
  first_of_part,
  max_over,
  parts,
  per_shard,
  sum_over,
  sum_to_part,
  whole,
)

_TABLE = (axes.EMBED, axes.VOCAB)


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
  """`config.objective`: cross-entropy plus the z-loss of Chameleon (§2.4)."""

  kind: str = option(
    "next_token", "registered objective or package.module:Class"
  )
  z_loss: float = option(1e-5, "weight of log² Z", minimum=0.0)
  chunk: int = option(
    256, "positions of each row whose logits exist at one time", minimum=1
  )
  word_dropout: float = option(
    0.0,
    "largest rate of word dropout (Bowman et al. 2016, §3.1): in each document"
    " input ids of other modalities than text are random ones of their modality,"
    " at a rate drawn evenly up to this, so that a picture is predicted less"
    " from its own beginning and more from its caption; targets stay",
    minimum=0.0,
    maximum=1.0,
  )

  def check_model(self, path: str, model: Any) -> None:
    """Rules that join an objective and what it trains; any model will do here.

    Args:
      path: the objective's dotted name, for messages.
      model: `config.model`.
    """
    del path, model


class NextToken:
  """mean over weighted targets of  −log p(target) + z_loss · log² Z.

  Logits exist for `chunk` positions of a row at a time, in the forward pass only,
  which takes their gradient along; nothing holds [B, L, V] of a long row.
  """

  Config = NextTokenConfig

  def __init__(
    self,
    config: NextTokenConfig,
    vocabulary: Vocabulary,
    token_bytes: np.ndarray,
  ):
    self.config = config
    self.vocabulary = vocabulary
    self.token_bytes = np.asarray(token_bytes, np.float32)

  def balance(self, batch: Batch) -> Batch:
    """The batch with weights of whose sum "loss" is the mean: these are.

    What is minimised is one mean over the whole batch of a step. An objective
    that is a sum of several scales its weights here, once, before the batch is
    split into microbatches.

    Args:
      batch: all rows of a step.
    """
    return batch

  def __call__(
    self,
    model: Any,
    params: Any,
    batch: Batch,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
  ) -> dict[str, Mean]:
    """Runs the model and scores its predictions.

    Args:
      model: has `apply` and `unembedding`.
      params: its parameters.
      batch: rows of packed documents.
      train: whether dropout acts.
      dropout_key: for dropout; not needed where there is none.

    Returns:
      "loss" (what is minimised), "z_loss", and per modality m of the target
      "loss/m" and "accuracy/m", "tokens/m"; for the text modality
      "bits_per_byte/m", over the targets that stand for bytes. Only "loss"
      carries a gradient.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    if train and self.config.word_dropout and dropout_key is not None:
      batch = self._drop_words(batch, jax.random.fold_in(dropout_key, 1))
    hidden = model.apply({"params": params}, batch, train=train, rngs=rngs)
    return self._score(model, params, hidden, batch)

  def _score(
    self, model: Any, params: Any, hidden: jax.Array, batch: Batch
  ) -> dict[str, Mean]:
    """Scores the next tokens of hidden states [B, L, d]."""
    row = (axes.ACT_BATCH,)
    if batch.stored is not None:
      row = (axes.ACT_BATCH, axes.ACT_LENGTH)
    table, weight = model.unembedding(params), batch.weight
    if batch.span is not None:  # weights there are not of next tokens
      weight = jnp.where(batch.span > 0, 0.0, weight)
    scored: Any = _scored(self, row, hidden, table, batch.target, weight)
    loss, sums = scored
    names = self.vocabulary.modalities
    nll, weight = sums["nll"], sums["weight"]
    means = {
      "loss": Mean(loss, weight.sum()),
      "z_loss": Mean(sums["z"], weight.sum()),
    }
    one = jnp.ones((), jnp.float32)
    for i, name in enumerate(names):
      if i in self.vocabulary.continuous:
        continue  # such a target says nothing
      means[f"loss/{name}"] = Mean(nll[i], weight[i])
      means[f"accuracy/{name}"] = Mean(sums["correct"][i], weight[i])
      means[f"tokens/{name}"] = Mean(weight[i], one)
    means[f"bits_per_byte/{names[0]}"] = Mean(
      sums["byte_nll"] / np.log(2.0).astype(np.float32), sums["bytes"]
    )
    return means

  def _drop_words(self, batch: Batch, key: jax.Array) -> Batch:
    """Replaces some inputs; targets stay, and continuous positions: one id."""
    vocabulary = self.vocabulary
    which, what, rates = jax.random.split(key, 3)
    modality, segment = jnp.asarray(batch.modality), jnp.asarray(batch.segment)
    size = jnp.asarray(vocabulary.sizes)[modality]
    first = jnp.asarray(vocabulary.ends)[modality] - size
    other = first + jax.random.randint(what, size.shape, 0, size)
    rate = jax.random.uniform(rates, size.shape) * self.config.word_dropout
    # A row has fewer documents than positions.
    rate = jnp.take_along_axis(rate, segment - 1, axis=1, mode="clip")
    drop = jax.random.uniform(which, size.shape) < rate
    drop &= modality > 0
    return dataclasses.replace(
      batch, tokens=jnp.where(drop, other, batch.tokens)
    )


# Rows lie over devices as the hidden states do, ids as the output table does. The
# table is gathered once, not once a chunk, and its gradient is summed once.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(objective, row, hidden, table, target, weight):
  """(total loss to minimise, sums for the metrics) of all positions."""
  f = functools.partial(_scan, objective, row, gradient=False)
  return per_shard(f, (row, _TABLE, row, row), ())(
    hidden, table, target, weight
  )


def _forward(objective, row, hidden, table, target, weight):
  # The gradient of a chunk is taken while its logits exist: three matmuls, and
  # neither logits kept nor logits computed twice.
  f = functools.partial(_scan, objective, row, gradient=True)
  return per_shard(f, (row, _TABLE, row, row), ((), (row, _TABLE)))(
    hidden, table, target, weight
  )


def _backward(objective, row, pulled, cotangents):
  g, _ = cotangents  # the metrics carry no gradient
  d_hidden, d_table = pulled
  scaled = (d_hidden * g).astype(d_hidden.dtype), d_table * g
  return *scaled, None, None


_scored.defvjp(_forward, _backward)


def _scan(objective, row, hidden, table, target, weight, *, gradient):
  """Goes through a device's part of the rows by chunks of positions."""
  config, vocabulary = objective.config, objective.vocabulary
  rows, length, width = hidden.shape
  chunks = -(-length // config.chunk)
  size = -(-length // chunks)
  names, ids = len(vocabulary.modalities), table.shape[-1] * parts(axes.VOCAB)
  # Ids beyond the tokenizers' stand for no bytes.
  bytes_of = np.zeros(ids, np.float32)
  bytes_of[: objective.token_bytes.size] = objective.token_bytes
  compute_table = whole(table.astype(hidden.dtype), 0, axes.EMBED)
  own_ids = jnp.arange(table.shape[-1])
  if parts(axes.VOCAB) > 1:
    own_ids += first_of_part(table.shape[-1], axes.VOCAB)

  def split(x):
    """[B, L, ...] to [chunks, B, size, ...]."""
    pad = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(rows, chunks, size, *x.shape[2:])
    return x.swapaxes(0, 1)

  def body(carry, chunk):
    (loss, sums, d_table), (h, target, weight) = carry, chunk
    logits = jnp.matmul(h, compute_table, preferred_element_type=jnp.float32)
    if vocabulary.continuous:
      silent = jnp.isin(own_ids, jnp.asarray(vocabulary.placeholders))
      # Finite, that 0 times a score is 0 wherever it is looked at.
      logits = jnp.where(silent, -1e30, logits)
    top = max_over(logits.max(axis=-1), axes.VOCAB)
    exponentials = jnp.exp(logits - top[..., None])
    total = sum_over(exponentials.sum(-1), axes.VOCAB)
    log_z = top + jnp.log(total)
    # One-hot by comparison: a gather's transpose would be a scatter.
    hot = own_ids == target[..., None]
    chosen = sum_over(jnp.sum(jnp.where(hot, logits, 0.0), axis=-1), axes.VOCAB)
    nll = log_z - chosen
    per = weight * (
      vocabulary.modality_of(target) == jnp.arange(names)[:, None, None]
    )
    size_in_bytes = jnp.asarray(bytes_of)[target]
    new = {
      "nll": (per * nll).sum((1, 2)),
      # As argmax == target, which XLA's CPU backend does 5x slower than max.
      "correct": (per * (chosen >= top)).sum((1, 2)),
      "weight": per.sum((1, 2)),
      "z": (weight * log_z**2).sum(),
      "byte_nll": (per[0] * nll * (size_in_bytes > 0)).sum(),
      "bytes": (per[0] * size_in_bytes).sum(),
    }
    sums = jax.tree.map(jnp.add, sums, new)
    loss += (weight * (nll + config.z_loss * log_z**2)).sum()
    if not gradient:
      return (loss, sums, d_table), None
    # d loss / d logits = w · (softmax · (1 + 2 z_loss log Z) − one-hot).
    slope = weight * (1 + 2 * config.z_loss * log_z) / total
    d_logits = exponentials * slope[..., None]
    d_logits -= jnp.where(hot, weight[..., None], 0.0)
    d_logits = d_logits.astype(h.dtype)
    d_h = sum_over(jnp.matmul(d_logits, compute_table.T), axes.VOCAB)
    d_table += jnp.einsum(
      "BLD,BLV->DV", h, d_logits, preferred_element_type=jnp.float32
    )
    return (loss, sums, d_table), d_h

  zero = jnp.zeros((), jnp.float32)
  sums = dict.fromkeys(("nll", "correct", "weight"), jnp.zeros(names))
  sums |= dict.fromkeys(("z", "byte_nll", "bytes"), zero)
  shape = compute_table.shape if gradient else ()
  d_table = jnp.zeros(shape, jnp.float32)
  scanned: Any = jax.lax.scan(
    body, (zero, sums, d_table), (split(hidden), split(target), split(weight))
  )
  (loss, sums, d_table), d_hidden = scanned
  scored = sum_over((loss, sums), *row)
  if not gradient:
    return scored
  d_hidden = d_hidden.swapaxes(0, 1).reshape(rows, chunks * size, width)
  d_table = sum_to_part(d_table, 0, axes.EMBED)
  d_table = sum_over(d_table, *row, but=axes.EMBED)
  return scored, (d_hidden[:, :length], d_table)
