"""Rows on their way: what they are, cutting back, copying.

A row's state is its ids and how many there are. Keys and values of all but the last
of them are in the cache; the last one is run by the next step. So a row is cut
back by a smaller length, copied by copying, and no step is special.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError

RUNNING, EOS, STOP, FULL = range(4)
FINISH = ("running", "eos", "stop", "length")


@flax.struct.dataclass
class State:
  """Rows on their way. Arrays of `B` rows, at most `S` ids each.

  Attributes:
    tokens: ids, prompt first; 0 behind them.
    length: how many ids.
    prompt: how many of them were the prompt.
    limit: ids at which a row is full, at most S.
    finished: `RUNNING`, or an index of `FINISH`.
    keys: random stream of each row.
    cache: the model's, of B rows; with guidance of 2B, the second half those of
      the current block in a document without caption.
    latents: values of the continuous positions, 0 elsewhere; None for a model
      that has none, like the next one.
    snapshots: K estimates of them from on the way, of pictures drawn here.
  """

  tokens: Int[Array, "B S"]
  length: Int[Array, " B"]
  prompt: Int[Array, " B"]
  limit: Int[Array, " B"]
  finished: Int[Array, " B"]
  keys: Key[Array, " B"]
  cache: Any
  latents: Float[Array, "B S C"] | None = None
  snapshots: Float[Array, "B K S C"] | None = None


def fork(state: State, rows: Int[np.ndarray, " b"]) -> State:
  """Copies rows: `[0, 0, 2]` goes on twice from row 0 and once from row 2.

  Give the copies other `keys` where they are to differ.

  Args:
    state: of B rows.
    rows: indices into them.
  """
  count = state.tokens.shape[0]
  held = jax.tree.leaves(state.cache)[0].shape[0]
  both = np.concatenate([rows + i * count for i in range(held // count)])
  cache = jax.tree.map(lambda leaf: leaf[both], state.cache)
  rest = dataclasses.replace(state, cache=None)
  rest = jax.tree.map(lambda leaf: leaf[rows], rest)
  return dataclasses.replace(rest, cache=cache)


def rollback(state: State, n: Int[Array, " B"]) -> State:
  """Takes the last n ids of each row away; finished rows run again where n > 0.

  What follows is what would have followed had they never been: the cache is not
  looked at beyond a row's length, and the randomness belongs to positions. A row
  that ends inside of a continuous picture draws all of it again, the same.

  Args:
    state: rows.
    n: at least 0, and less than the row's length.
  """
  length = state.length - n
  column = jnp.arange(state.tokens.shape[1])
  kept = column < length[:, None]
  latents, snapshots = state.latents, state.snapshots
  if latents is not None:
    latents = jnp.where(kept[..., None], latents, 0)
  if snapshots is not None:
    snapshots = jnp.where(kept[:, None, :, None], snapshots, 0)
  return dataclasses.replace(
    state,
    tokens=jnp.where(kept, state.tokens, 0),
    length=length,
    finished=jnp.where(n > 0, RUNNING, state.finished),
    latents=latents,
    snapshots=snapshots,
  )


def place_latents(
  prompts: Sequence[Sequence[int]],
  latents: Sequence[Float[np.ndarray, "_ C"] | None] | None,
  length: int,
  vocabulary: Vocabulary,
) -> Float[np.ndarray, "B S C"] | None:
  """Prompts' latents where their patches are; None for a model that has none.

  Raises:
    UserError: a picture that is begun and not whole, or latents that do not fit.
  """
  given = latents or [None] * len(prompts)
  width = vocabulary.latent_dim
  placed = np.zeros((len(prompts), length, width), np.float32)
  for row, (ids, values) in enumerate(zip(prompts, given, strict=True)):
    modality = vocabulary.modality_of(np.asarray(ids))
    inside = np.isin(modality, vocabulary.continuous)
    if inside[-1]:
      raise UserError(
        f"prompt {row} ends inside of a continuous picture; end it before the"
        f" first patch, or behind the picture's end"
      )
    found = (0, width) if values is None else np.shape(values)
    if found != (inside.sum(), width):
      raise UserError(
        f"prompt {row} has latents of shape {found}; its ids need"
        f" {(int(inside.sum()), width)}"
      )
    if values is not None:
      placed[row, : len(ids)][inside] = values
  return placed if vocabulary.continuous else None
