"""Pieces into rows, groups of rows into a static number of places per modality.

Every row is filled by the pieces of a lookahead window that fit it best, and
the pictures and texts of a group are kept in the proportion of its places. The
result depends on the lengths alone.
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Of the pictures and of the text that a group can take, the part that is not
# dealt but kept to fill rows exactly.
_KEPT_PICTURES = 0.7
_KEPT_TEXT = 0.5
# Pieces, oldest first, that are tried as one of the last two of a row.
_TRIES = 32


class _Shelf:
  """Waiting pieces of one kind: the oldest, or the longest that fits.

  Lengths that are present are the bits of an integer, so the longest piece of
  at most n tokens is found by one shift and `bit_length`.
  """

  def __init__(self, total: list[int]):
    self._total = total
    self._age: dict[int, None] = {}
    self._of_length: dict[int, collections.deque[int]] = (
      collections.defaultdict(collections.deque)
    )
    self._present = 0

  def __len__(self) -> int:
    return len(self._age)

  def oldest(self, number: int) -> list[int]:
    """Up to `number` pieces, oldest first."""
    return list(itertools.islice(self._age, number))

  def add(self, piece: int) -> None:
    """Puts a piece last."""
    self._age[piece] = None
    self._of_length[self._total[piece]].append(piece)
    self._present |= 1 << self._total[piece]

  def take(self, piece: int) -> None:
    """Removes a piece."""
    del self._age[piece]
    length = self._total[piece]
    self._of_length[length].remove(piece)
    if not self._of_length[length]:
      self._present &= ~(1 << length)

  def longest(self, room: int) -> int:
    """The oldest piece of the greatest length of at most `room`; -1 for none."""
    if room <= 0:
      return -1
    length = (self._present & ((2 << room) - 1)).bit_length() - 1
    return self._of_length[length][0] if length > 0 else -1


class _Packer:
  """The state of `pack`: the window, and the group that is being filled."""

  def __init__(
    self,
    lengths: Int[np.ndarray, "n K"],
    counts: Sequence[int],
    row_length: int,
    group_rows: int,
    lookahead: int,
  ):
    self.needs = lengths.tolist()
    self.total = lengths.sum(axis=1).tolist()
    self.pictured = (lengths[:, 1:].sum(axis=1) > 0).tolist()
    self.texts, self.pictures = _Shelf(self.total), _Shelf(self.total)
    self.rows = [-1] * len(self.needs)
    self.counts, self.row_length = list(counts), row_length
    self.group_rows = group_rows
    self.group = -1
    self.lookahead = lookahead

  def wants_more(self) -> bool:
    """Whether the window is short of pieces, or of one kind of them."""
    kinds = len(self.texts), len(self.pictures)
    return sum(kinds) < self.lookahead or min(kinds) < self.lookahead // 4

  def shelf(self, piece: int) -> _Shelf:
    """Where a piece waits."""
    return self.pictures if self.pictured[piece] else self.texts

  def open_group(self) -> None:
    """Starts the next group with empty rows."""
    self.group += 1
    self.room = [self.row_length] * self.group_rows
    self.places = list(self.counts)

  def fits(self, *pieces: int) -> bool:
    """Whether the group has places for these pieces together."""
    needs = zip(*(self.needs[p] for p in pieces), strict=True)
    return all(sum(n) <= p for n, p in zip(needs, self.places, strict=True))

  def spares(self, *pieces: int) -> bool:
    """Whether `fits`, and texts leave what the group's next pictures need."""
    if not self.fits(*pieces):
      return False
    if all(self.pictured[p] for p in pieces) or not self.picture_size:
      return True
    left = self.places[0] - sum(self.needs[p][0] for p in pieces)
    image = sum(self.places[1:]) - sum(sum(self.needs[p][1:]) for p in pieces)
    pictures = min(image // self.picture_size, len(self.pictures))
    return left >= pictures * self.picture_text

  def put(self, piece: int, row: int) -> None:
    """Moves a piece from the window into a row of the group."""
    self.shelf(piece).take(piece)
    self.rows[piece] = self.group * self.group_rows + row
    self.room[row] -= self.total[piece]
    for m, n in enumerate(self.needs[piece]):
      self.places[m] -= n

  def deal(self) -> None:
    """Gives the rows their first pieces, and keeps a reserve to fill with.

    The oldest piece of all always goes in, so that nothing waits for ever;
    then the oldest of each kind, the longest first, each into the row with the
    most room.
    """
    texts = self.texts.oldest(self.lookahead)
    pictures = []
    places = self.places[1:]
    for piece in self.pictures.oldest(self.lookahead):
      need = self.needs[piece][1:]
      if all(n <= p for n, p in zip(need, places, strict=True)):
        pictures.append(piece)
        places = [p - n for p, n in zip(places, need, strict=True)]
      if not any(places):
        break
    sample = self.pictures.oldest(_TRIES)
    self.picture_size = self.picture_text = 0.0
    if sample:
      self.picture_text = sum(self.needs[p][0] for p in sample) / len(sample)
      self.picture_size = (
        sum(self.total[p] for p in sample) / len(sample) - self.picture_text
      )
    # What pictures will leave for texts, all of them placed.
    text_room = min(
      self.places[0] - sum(self.needs[p][0] for p in pictures),
      self.row_length * self.group_rows - sum(self.total[p] for p in pictures),
    )
    kept = min(len(pictures) * _KEPT_PICTURES, 2 * self.group_rows)
    chosen = pictures[: len(pictures) - int(kept)]
    mean = sum(self.total[p] for p in texts) / max(len(texts), 1)
    reserve = min(text_room * _KEPT_TEXT, mean * self.group_rows)
    for piece in texts:
      text_room -= self.total[piece]
      if text_room < reserve:
        break
      chosen.append(piece)
    first = min(texts[:1] + pictures[:1] + self.pictures.oldest(1))
    self.put(first, 0)
    for piece in sorted(chosen, key=lambda p: -self.total[p]):
      row = self.room.index(max(self.room))
      if (
        piece != first
        and self.total[piece] <= self.room[row]
        and self.fits(piece)
      ):
        self.put(piece, row)

  def fill(self) -> None:
    """Fills every row from the window, the one with the most room first.

    A row's share of the pictures that the group still takes is in proportion
    to its room, so that the last row is left with what can fill it.
    """
    waiting = set(range(self.group_rows))
    while waiting:
      row = max(waiting, key=lambda r: self.room[r])
      all_room = sum(self.room[r] for r in waiting)
      waiting.remove(row)
      share = 0
      if self.picture_size:
        pictures = sum(self.places[1:]) / self.picture_size
        share = round(pictures * self.room[row] / max(all_room, 1))
      while (piece := self._next(row, share)) >= 0:
        share -= self.pictured[piece]
        self.put(piece, row)

  def _next(self, row: int, share: int) -> int:
    """The next piece of a row, or -1: the first of the pair that fills best."""
    room = self.room[row]
    if room <= 0:
      return -1
    if share > 2:
      piece = self.pictures.oldest(1)[0] if len(self.pictures) else -1
      if piece >= 0 and self.total[piece] <= room and self.fits(piece):
        return piece
    best, gap = -1, room
    for number in sorted(range(3), key=lambda n: abs(n - share)):
      one = self.pictures if number else self.texts
      other = self.pictures if number == 2 else self.texts
      if number < 2:
        piece = one.longest(room)
        if piece >= 0 and room - self.total[piece] < gap and self.spares(piece):
          best, gap = piece, room - self.total[piece]
      for piece in one.oldest(_TRIES):
        if gap == 0:
          return best
        left = room - self.total[piece]
        if left <= 0:
          continue
        second = other.longest(left)
        if second < 0 or second == piece:
          continue
        left -= self.total[second]
        if left < gap and self.spares(piece, second):
          best, gap = piece, left
    return best


def pack(
  lengths: Int[np.ndarray, "n K"],
  *,
  counts: Sequence[int],
  row_length: int,
  group_rows: int,
  lookahead: int,
) -> tuple[Int[np.ndarray, " n"], int]:
  """Puts pieces into rows, group after group.

  A group takes the oldest picture documents of the window that its places hold
  and the oldest texts, up to a reserve of both, and deals them to its rows;
  then every row is filled from the window by the pieces, the last two together,
  that leave least room. What finds no place waits for the next group.

  Args:
    lengths: tokens of each modality of each piece, in stream order; each fits a
      row and a group's places.
    counts: places of each modality in a group.
    row_length: tokens of a row.
    group_rows: rows of a group.
    lookahead: pieces in the window, a quarter of them at least of each kind.

  Returns:
    int64 row of each piece and the number of groups.
  """
  packer = _Packer(lengths, counts, row_length, group_rows, lookahead)
  arrived = 0
  while True:
    while arrived < len(lengths) and packer.wants_more():
      packer.shelf(arrived).add(arrived)
      arrived += 1
    if not len(packer.texts) + len(packer.pictures):
      return np.array(packer.rows, np.int64), packer.group + 1
    packer.open_group()
    packer.deal()
    packer.fill()
