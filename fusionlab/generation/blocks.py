"""Modality-constrained decoding: which ids may follow.

A block of another modality is `<begin> codes <end>` with a fixed number of codes
(64 for a picture of 8 x 8). Text may open a block; inside of one only its
modality's ids are allowed, after its last code only `<end>`. Where a row stands
follows from its ids, so nothing is kept and a row that is cut back is right.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The rules of a vocabulary.

  Attributes:
    vocabulary: the shared id space.
    lengths: codes of one block of each modality; 0 for text.
  """

  vocabulary: Vocabulary
  lengths: tuple[int, ...]

  def check(self, ids: Sequence[int]) -> None:
    """Refuses a prompt in which a block is broken; the last may be open.

    Raises:
      UserError: names the block and the position.
    """
    vocabulary = self.vocabulary
    opened, left = 0, 0
    for at, i in enumerate(ids):
      if not 0 <= i < vocabulary.size:
        raise UserError(
          f"prompt: id {i} at position {at} is not in 0..{vocabulary.size - 1}"
        )
      modality = int(np.searchsorted(vocabulary.ends, i, side="right"))
      if opened and left:
        name, length = vocabulary.modalities[opened], self.lengths[opened]
        if modality != opened:
          raise UserError(
            f"prompt: the {name} block ends at position {at} after"
            f" {length - left} of its {length} codes"
          )
        left -= 1
      elif opened:
        if i != vocabulary.end[opened]:
          raise UserError(
            f"prompt: id {i} at position {at}, where the end of a"
            f" {vocabulary.modalities[opened]} block"
            f" ({vocabulary.end[opened]}) must stand"
          )
        opened = 0
      elif modality:
        raise UserError(
          f"prompt: {vocabulary.modalities[modality]} code {i} at position {at}"
          f" stands outside of a block"
        )
      elif i in vocabulary.begin[1:]:
        opened = vocabulary.begin.index(i, 1)
        left = self.lengths[opened]

  def where(
    self, tokens: Int[Array, "B S"], length: Int[Array, " B"]
  ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Where each row stands.

    Args:
      tokens: ids of the rows.
      length: how many of them count, at least 1.

    Returns:
      The modality of the block that is open (0: none), and how many of its ids
      stand in the row, `<begin>` included (0: none).
    """
    column = jnp.arange(tokens.shape[1])
    modality = self.vocabulary.modality_of(tokens)
    counted = column < length[:, None]
    last_text = jnp.where(counted & (modality == 0), column, -1).max(axis=1)
    codes = length - 1 - last_text
    at = jnp.maximum(last_text, 0)[:, None]
    before = jnp.take_along_axis(tokens, at, axis=1)
    begins = jnp.asarray(self.vocabulary.begin, jnp.int32).at[0].set(-1)
    opens = before == begins
    opened = jnp.where(opens.any(axis=1), jnp.argmax(opens, axis=1), 0)
    return opened.astype(jnp.int32), jnp.where(opened > 0, 1 + codes, 0)

  def restrict(
    self,
    logits: Float[Array, "B V"],
    opened: Int[Array, " B"],
    inside: Int[Array, " B"],
    *,
    room: Int[Array, " B"],
    may_open: tuple[int, ...],
  ) -> Float[Array, "B V"]:
    """Cuts the ids that may not follow.

    Args:
      logits: of the next id; V may exceed the vocabulary.
      opened: open block of each row, of `where`.
      inside: its ids so far, of `where`.
      room: ids that the row may still get; a block that would not fit whole is
        not opened.
      may_open: modalities that text may open.
    """
    lengths = jnp.asarray(self.lengths, jnp.int32)
    full = inside > lengths[opened]
    state = jnp.where(opened > 0, 2 * opened - 1 + full, 0)
    allowed = jnp.asarray(self._table(may_open, logits.shape[1]))[state]
    logits = jnp.where(allowed, logits, -jnp.inf)
    for m in may_open:
      begin = self.vocabulary.begin[m]
      fits = room >= self.lengths[m] + 2
      column = jnp.where(fits, logits[:, begin], -jnp.inf)
      logits = logits.at[:, begin].set(column)
    return logits

  @functools.lru_cache(maxsize=16)  # noqa: B019 - frozen, few
  def _table(
    self, may_open: tuple[int, ...], size: int
  ) -> Bool[np.ndarray, "states V"]:
    """Allowed ids: in text, then per modality inside of a block and at its end."""
    v = self.vocabulary
    table = np.zeros((2 * len(v.modalities) - 1, size), bool)
    table[0, : v.ends[0]] = True
    table[0, v.specials] = False
    table[0, [v.eos, *(v.begin[m] for m in may_open)]] = True
    for m in range(1, len(v.modalities)):
      table[2 * m - 1, v.offset(m) : v.ends[m]] = True
      table[2 * m, v.end[m]] = True
    return table
