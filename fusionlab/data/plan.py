"""The packing plan: which documents stand in which row, for a whole epoch.

A plan is a pure function of (seed, epoch, weights, counts). Documents are taken
in the order of the seeded mixture through a lookahead window and put into rows;
groups of rows share one count of places per modality, so that the arrays of a
group have static shapes. No document is torn, but for one rule: a document of
text alone that is longer than a row (or than a group's text places) is cut into
the fewest pieces that fit: full ones, and one with the rest.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from fusionlab.data import documents as docs
from fusionlab.data.documents import Chances, Counts
from fusionlab.data.packing import pack
from fusionlab.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Stream:
  """One source as the plan sees it.

  Attributes:
    name: the source's name; its hash is the key of all draws.
    counts: shapes of its records.
    weight: passes over the source in one epoch.
    subset: record indices of the stream, or None for all.
  """

  name: str
  counts: Counts
  weight: float
  subset: Int[np.ndarray, " n"] | None = None

  @property
  def documents(self) -> Int[np.ndarray, " _"]:
    """Record indices of one pass, in stored order."""
    if self.subset is None:
      return np.arange(len(self.counts))
    return self.subset


@dataclasses.dataclass(frozen=True)
class Plan:
  """The rows of one epoch, as flat arrays.

  Attributes:
    source, document: int32 [n], of each piece, row after row.
    passes: int32 [n], pass over the source in which the document is read.
    start, stop: int32 [n], tokens of the document that the piece holds.
    row_start: int64 [rows + 1], first piece of each row.
    group_rows: rows of a group.
    used: int64 [groups, K], tokens of each modality in each group.
  """

  source: Int[np.ndarray, " n"]
  document: Int[np.ndarray, " n"]
  passes: Int[np.ndarray, " n"]
  start: Int[np.ndarray, " n"]
  stop: Int[np.ndarray, " n"]
  row_start: Int[np.ndarray, " R"]
  group_rows: int
  used: Int[np.ndarray, "G K"]

  @property
  def num_groups(self) -> int:
    """Groups of the epoch."""
    return len(self.used)


def layout_counts(
  layout: str,
  modalities: Sequence[str],
  expected: Float[np.ndarray, " K"],
  unit: Int[np.ndarray, " K"],
  *,
  row_length: int,
  group_rows: int,
  align: int = 1,
) -> tuple[int, ...]:
  """Places of each modality in a group, summing to `group_rows · row_length`.

  Args:
    layout: 'auto', or a fraction for each modality ('text=0.4 image=0.6').
    modalities: names, in order of modality id; the first, text, takes what
      rounding leaves.
    expected: tokens of each modality in an epoch of the mixture.
    unit: what tokens of a modality come in multiples of (64 where every picture
      has 64 codes); 'auto' takes the whole number of units with which the
      emptier modality is fullest.
    row_length: tokens of a row.
    group_rows: rows of a group.
    align: counts are multiples of this.

  Raises:
    UserError: a string that is not fractions of all modalities that sum to 1,
      or an alignment that does not divide the group.
  """
  size = group_rows * row_length
  if size % align:
    raise UserError(
      f"config.data.align={align} does not divide the {size} tokens of a group"
      f" ({group_rows} rows x {row_length}); choose a divisor"
    )
  if layout != "auto":
    fractions = _parse_layout(layout, modalities)
    rest = [align * round(f * size / align) for f in fractions[1:]]
    return (size - sum(rest), *rest)
  share = expected / max(expected.sum(), 1) * size
  choices = []
  for mine, step in zip(share[1:], unit[1:], strict=True):
    if mine == 0:
      choices.append([0])
      continue
    low = int(mine / step)
    whole = [max(k, 1) * int(step) for k in (low, low + 1)]
    choices.append([-(-n // align) * align for n in whole])

  def emptiest(rest: tuple[int, ...]) -> float:
    places = np.array([size - sum(rest), *rest], np.float64)
    if places[0] < 0 or (places[expected > 0] == 0).any():
      return -1.0
    # Text fills its places to about 99%, other modalities theirs in units.
    usable = np.where(np.arange(len(places)) == 0, 0.99, 1.0) * places
    usable[1:] -= places[1:] % unit[1:]
    present = expected > 0
    if (usable[present] <= 0).any():
      return -1.0
    groups = (expected[present] / usable[present]).max()
    return float((expected[present] / (groups * places[present])).min())

  rest = max(itertools.product(*choices), key=emptiest)
  return (size - sum(rest), *rest)


def _parse_layout(layout: str, modalities: Sequence[str]) -> list[float]:
  """Fractions of `layout`, in order of modality id."""
  example = " ".join(f"{m}={1 / len(modalities):.2g}" for m in modalities)
  advice = f"write 'auto' or fractions that sum to 1, e.g. {example!r}"
  fractions: dict[str, float] = {}
  for word in layout.split():
    name, _, number = word.partition("=")
    if name not in modalities:
      raise UserError(
        f"config.data.layout={layout!r}: unknown modality"
        f" {name!r}{nearest(name, modalities)} {advice}"
      )
    try:
      fractions[name] = float(number)
    except ValueError:
      raise UserError(
        f"config.data.layout={layout!r}: {number!r} is not a number; {advice}"
      ) from None
    if not 0 <= fractions[name] <= 1:
      raise UserError(
        f"config.data.layout={layout!r}: {number} is not between 0 and 1;"
        f" {advice}"
      )
  missing = [m for m in modalities if m not in fractions]
  if missing:
    raise UserError(
      f"config.data.layout={layout!r} has no fraction for {', '.join(missing)};"
      f" {advice}"
    )
  total = sum(fractions.values())
  if abs(total - 1) > 1e-6:
    terms = " + ".join(f"{fractions[m]:g}" for m in modalities)
    raise UserError(
      f"config.data.layout={layout!r}: {terms} = {total:g}, not 1; {advice}"
    )
  return [fractions[m] for m in modalities]


def check_fit(
  streams: Sequence[Stream],
  modalities: Sequence[str],
  counts: Sequence[int],
  row_length: int,
) -> None:
  """Refuses documents that no row can hold: pictures are never torn.

  Args:
    streams: the sources.
    modalities: names, in order of modality id.
    counts: places of each modality in a group.
    row_length: tokens of a row.

  Raises:
    UserError: naming the source and document, with the arithmetic.
  """
  for stream in streams:
    of = stream.documents
    length = docs.largest_lengths(stream.counts, len(modalities))[of]
    picture = length[:, 1:].sum(axis=1) > 0
    if (~picture).any() and min(counts[0], row_length) < 2:
      raise UserError(
        f"config.data.layout leaves {counts[0]} places for text in a group, but"
        f" source {stream.name!r} has text; give text a larger fraction"
      )
    length = np.where(picture[:, None], length, 0)
    total = length.sum(axis=1)
    if len(total) and total.max() > row_length:
      worst = int(total.argmax())
      terms = _terms(length[worst], modalities)
      raise UserError(
        f"source {stream.name!r}: document {of[worst]} needs {terms} ="
        f" {total[worst]} tokens, a row has config.data.row_length={row_length};"
        f" pictures are not split: raise row_length to {total[worst]} or shorten"
        f" its text"
      )
    for m, name in enumerate(modalities):
      worst = int(length[:, m].argmax()) if len(length) else 0
      if len(length) and length[worst, m] > counts[m]:
        raise UserError(
          f"source {stream.name!r}: document {of[worst]} needs"
          f" {length[worst, m]} {name} places, a group has {counts[m]} of"
          f" {sum(counts)}; give {name} at least"
          f" {length[worst, m] / sum(counts):.3f} in config.data.layout or raise"
          f" config.data.group_rows"
        )


def _terms(length: Int[np.ndarray, " K"], modalities: Sequence[str]) -> str:
  return " + ".join(f"{n} {m}" for n, m in zip(length, modalities, strict=True))


def epoch_documents(
  streams: Sequence[Stream], *, seed: int, epoch: int, shuffle: bool = True
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """The documents of an epoch, in the order of the seeded mixture.

  Pass p over a source is a permutation drawn from (seed, source, p); the passes
  one after another are the source's stream, and epoch e reads its positions
  round(e·w·n) to round((e + 1)·w·n). With weight w = 1 every document is read
  exactly once an epoch, with w = 0.25 exactly once in four. Streams are
  interleaved evenly, each document at a random place within its n-th part of
  the epoch.

  Args:
    streams: the sources.
    seed: root of the order.
    epoch: epoch of the mixture, from 0.
    shuffle: False reads one pass in stored order (held-out data).

  Returns:
    int32 source index, record index and pass of each document.
  """
  columns: list[tuple[np.ndarray, ...]] = []
  for index, stream in enumerate(streams):
    members = stream.documents
    n = len(members)
    if not shuffle:
      zero = np.zeros(n, np.int64)
      columns.append((zero + index, members, zero, np.arange(n) + 0.0))
      continue
    key = docs.stream_key(stream.name)
    first, last = (round(e * stream.weight * n) for e in (epoch, epoch + 1))
    position = np.arange(first, last)
    passes = position // max(n, 1)
    document = np.empty(len(position), np.int64)
    for p in np.unique(passes):
      order = np.argsort(
        docs.hashed(seed, key, docs.SHUFFLE, int(p), members), kind="stable"
      )
      here = passes == p
      document[here] = members[order[position[here] % n]]
    jitter = docs.uniform(seed, key, docs.MIX, position)
    when = (np.arange(len(position)) + jitter) / max(len(position), 1)
    columns.append((np.full(len(position), index), document, passes, when))
  source, document, passes, when = (
    np.concatenate(c) for c in zip(*columns, strict=True)
  )
  order = np.argsort(when, kind="stable") if shuffle else np.arange(len(when))
  return (
    source[order].astype(np.int32),
    document[order].astype(np.int32),
    passes[order].astype(np.int32),
  )


def plan_epoch(
  streams: Sequence[Stream],
  *,
  seed: int,
  epoch: int,
  chances: Chances,
  counts: Sequence[int],
  row_length: int,
  group_rows: int,
  lookahead: int,
  shuffle: bool = True,
) -> Plan:
  """Plans the rows of one epoch; the same arguments give the same rows.

  Args:
    streams: the sources.
    seed: root of order and draws.
    epoch: epoch of the mixture, from 0.
    chances: probabilities of the draws about captions.
    counts: places of each modality in a group.
    row_length: tokens of a row.
    group_rows: rows of a group.
    lookahead: documents among which the next ones are chosen.
    shuffle: False reads one pass in stored order (held-out data).
  """
  source, document, passes = epoch_documents(
    streams, seed=seed, epoch=epoch, shuffle=shuffle
  )
  lengths = np.zeros((len(source), len(counts)), np.int64)
  for index, stream in enumerate(streams):
    here = source == index
    draws = docs.draw(
      stream.counts,
      document[here],
      passes[here],
      seed=seed,
      source=docs.stream_key(stream.name),
      chances=chances,
    )
    lengths[here] = docs.document_lengths(
      stream.counts, document[here], draws, len(counts)
    )
  owner, start, stop = _pieces(lengths, min(row_length, counts[0]))
  pieces = lengths[owner]
  text_only = pieces[:, 1:].sum(axis=1) == 0
  pieces[text_only, 0] = (stop - start)[text_only]
  rows, num_groups = pack(
    pieces,
    counts=counts,
    row_length=row_length,
    group_rows=group_rows,
    lookahead=lookahead,
  )
  order = np.argsort(rows, kind="stable")
  pieces_per_row = np.bincount(rows, minlength=num_groups * group_rows)
  used = np.zeros((num_groups, len(counts)), np.int64)
  np.add.at(used, rows // group_rows, pieces)
  chosen = owner[order]
  return Plan(
    source=source[chosen],
    document=document[chosen],
    passes=passes[chosen],
    start=start[order].astype(np.int32),
    stop=stop[order].astype(np.int32),
    row_start=docs.offsets(pieces_per_row),
    group_rows=group_rows,
    used=used,
  )


def _pieces(
  lengths: Int[np.ndarray, "n K"], limit: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
  """Cuts text-only documents above `limit` into full pieces and a rest.

  Equal pieces would leave a hole in every row: two of them rarely share one.

  Returns:
    document, first token and end of each piece.
  """
  total = lengths.sum(axis=1)
  text_only = lengths[:, 1:].sum(axis=1) == 0
  number = np.where(text_only, -(-total // limit), 1)
  owner = np.repeat(np.arange(len(total)), number)
  which = docs.ragged(np.zeros_like(number), number)
  start = which * np.where(text_only, limit, 0)[owner]
  stop = np.where(text_only[owner], start + limit, total[owner])
  stop = np.minimum(stop, total[owner])
  return owner, start, stop
