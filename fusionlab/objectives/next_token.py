"""Next-token prediction over the shared vocabulary, per target modality."""

import dataclasses
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


class NextToken:
  """mean over weighted targets of  −log p(target) + z_loss · log² Z.

  Logits exist for `chunk` positions of a row at a time and are recomputed in
  the backward pass, so nothing holds [B, L, V].
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
      model: has `apply` and `logits`.
      params: its parameters.
      batch: rows of packed documents.
      train: whether dropout acts.
      dropout_key: for dropout; not needed where the model has none.

    Returns:
      "loss" (what is minimised), "z_loss", and per modality m of the target
      "loss/m" and "accuracy/m", "tokens/m"; for the text modality
      "bits_per_byte/m", over the targets that stand for bytes.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden = model.apply({"params": params}, batch, train=train, rngs=rngs)
    sums = self._score(model, params, hidden, batch)
    names = self.vocabulary.modalities
    nll, weight = sums["nll"], sums["weight"]
    total_weight = weight.sum()
    means = {
      "loss": Mean(
        nll.sum() + self.config.z_loss * sums["z"], total_weight
      ),
      "z_loss": Mean(sums["z"], total_weight),
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

  def _score(
    self, model: Any, params: Any, hidden: jax.Array, batch: Batch
  ) -> dict[str, jax.Array]:
    rows, length, _ = hidden.shape
    chunks = -(-length // self.config.chunk)
    size = -(-length // chunks)

    def split(x: jax.Array) -> jax.Array:
      """[B, L, ...] to [chunks, B, size, ...]: rows stay whole for sharding."""
      pad = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2)
      x = jnp.pad(x, pad).reshape(rows, chunks, size, *x.shape[2:])
      return x.swapaxes(0, 1)

    @jax.checkpoint
    def body(sums, chunk):
      hidden, target, weight = chunk
      logits = model.logits(params, hidden)
      log_z = jax.nn.logsumexp(logits, axis=-1)
      # One-hot by comparison: a gather's transpose would be a scatter.
      hot = jnp.arange(logits.shape[-1]) == target[..., None]
      chosen = jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
      nll = log_z - chosen
      # As argmax == target, which XLA's CPU backend does 5x slower than max.
      correct = chosen >= logits.max(axis=-1)
      modality = self.vocabulary.modality_of(target)
      per = weight * (
        modality == jnp.arange(len(self.vocabulary.modalities))[:, None, None]
      )
      # Ids beyond the tokenizers' stand for no bytes.
      table = np.zeros(logits.shape[-1], np.float32)
      table[: self.token_bytes.size] = self.token_bytes
      bytes_ = jnp.asarray(table)[target]
      new = {
        "nll": (per * nll).sum((1, 2)),
        "correct": (per * correct).sum((1, 2)),
        "weight": per.sum((1, 2)),
        "z": (weight * log_z**2).sum(),
        "byte_nll": (per[0] * nll * (bytes_ > 0)).sum(),
        "bytes": (per[0] * bytes_).sum(),
      }
      return jax.tree.map(jnp.add, sums, new), None

    k = len(self.vocabulary.modalities)
    zero = jnp.zeros((), jnp.float32)
    sums = {
      "nll": jnp.zeros(k),
      "correct": jnp.zeros(k),
      "weight": jnp.zeros(k),
      "z": zero,
      "byte_nll": zero,
      "bytes": zero,
    }
    split_batch = (split(hidden), split(batch.target), split(batch.weight))
    sums, _ = jax.lax.scan(body, sums, split_batch)
    return sums
