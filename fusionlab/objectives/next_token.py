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
    scored: Any = _scored(
      self, hidden, model.unembedding(params), batch.target, batch.weight
    )
    loss, sums = scored
    names = self.vocabulary.modalities
    nll, weight = sums["nll"], sums["weight"]
    means = {
      "loss": Mean(loss, weight.sum()),
      "z_loss": Mean(sums["z"], weight.sum()),
    }
    one = jnp.ones((), jnp.float32)
    for i, name in enumerate(names):
      means[f"loss/{name}"] = Mean(nll[i], weight[i])
      means[f"accuracy/{name}"] = Mean(sums["correct"][i], weight[i])
      means[f"tokens/{name}"] = Mean(weight[i], one)
    means[f"bits_per_byte/{names[0]}"] = Mean(
      sums["byte_nll"] / np.log(2.0).astype(np.float32), sums["bytes"]
    )
    return means

  def _drop_words(self, batch: Batch, key: jax.Array) -> Batch:
    """Replaces some inputs; targets stay."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(objective, hidden, table, target, weight):
  """(total loss to minimise, sums for the metrics) of all positions."""
  return _scan(objective, hidden, table, target, weight, gradient=False)[:2]


def _forward(objective, hidden, table, target, weight):
  # The gradient of a chunk is taken while its logits exist: three matmuls, and
  # neither logits kept nor logits computed twice.
  loss, sums, pulled = _scan(
    objective, hidden, table, target, weight, gradient=True
  )
  return (loss, sums), pulled


def _backward(objective, pulled, cotangents):
  g, _ = cotangents  # the metrics carry no gradient
  d_hidden, d_table = pulled
  scaled = (d_hidden * g).astype(d_hidden.dtype), d_table * g
  return *scaled, None, None


_scored.defvjp(_forward, _backward)


def _scan(objective, hidden, table, target, weight, *, gradient):
  """Goes through the rows by chunks of positions."""
  config, vocabulary = objective.config, objective.vocabulary
  rows, length, width = hidden.shape
  chunks = -(-length // config.chunk)
  size = -(-length // chunks)
  names = len(vocabulary.modalities)
  # Ids beyond the tokenizers' stand for no bytes.
  bytes_of = np.zeros(table.shape[-1], np.float32)
  bytes_of[: objective.token_bytes.size] = objective.token_bytes
  compute_table = table.astype(hidden.dtype)

  def split(x):
    """[B, L, ...] to [chunks, B, size, ...]: rows stay whole for sharding."""
    pad = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(rows, chunks, size, *x.shape[2:])
    return x.swapaxes(0, 1)

  def body(carry, chunk):
    (loss, sums, d_table), (h, target, weight) = carry, chunk
    logits = jnp.matmul(h, compute_table, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1)
    exponentials = jnp.exp(logits - top[..., None])
    total = exponentials.sum(-1)
    log_z = top + jnp.log(total)
    # One-hot by comparison: a gather's transpose would be a scatter.
    hot = jnp.arange(logits.shape[-1]) == target[..., None]
    chosen = jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
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
    d_h = jnp.matmul(d_logits, compute_table.T)
    d_table += jnp.einsum(
      "BLD,BLV->DV", h, d_logits, preferred_element_type=jnp.float32
    )
    return (loss, sums, d_table), d_h

  zero = jnp.zeros((), jnp.float32)
  sums = dict.fromkeys(("nll", "correct", "weight"), jnp.zeros(names))
  sums |= dict.fromkeys(("z", "byte_nll", "bytes"), zero)
  d_table = jnp.zeros(table.shape if gradient else (), jnp.float32)
  scanned: Any = jax.lax.scan(
    body, (zero, sums, d_table), (split(hidden), split(target), split(weight))
  )
  (loss, sums, d_table), d_hidden = scanned
  if not gradient:
    return loss, sums, None
  d_hidden = d_hidden.swapaxes(0, 1).reshape(rows, chunks * size, width)
  return loss, sums, (d_hidden[:, :length], d_table)
