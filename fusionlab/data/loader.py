"""Batches by number: a random-access grain dataset over the packing plan.

Step s of a run is always the same batch. Its epoch follows from the cumulative
numbers of batches, its rows from the epoch's plan, and its documents from
records that are read at random, so a loader's state is one step number and any
number of processes may go on where another number left. The next epoch is
planned in the background while one is read.
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from fusionlab.batch import Batch, Vocabulary, packed_batch
from fusionlab.data import documents as docs
from fusionlab.data.documents import Chances, Record
from fusionlab.data.plan import Plan, Stream, plan_epoch
from fusionlab.errors import UserError
from fusionlab.routing import Layout
from fusionlab.sharding.batches import check_split, split_rows
from fusionlab.towers import tower_counts

_PLANS_KEPT = 3


@runtime_checkable
class RecordReader(Protocol):
  """Random access to the records of one source (`preparation.Records`)."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Rows:
  """The shape of batches and who makes which of their rows.

  Attributes:
    row_length: L, tokens of a row.
    group_rows: rows that share the layout's counts.
    batch_rows: rows of a step, over all processes.
    counts: places of each modality in a group.
    towers: tower of each modality; None leaves `Batch.layout` out.
    process_index, process_count: which equal share of the groups is made here.
    parts: context-parallel devices that the positions of a row are dealt to.
    latent_dim: values of a continuous position; 0 without continuous modalities.
    causal: whether continuous spans are causal, see `packed_batch`.
  """

  row_length: int
  group_rows: int
  batch_rows: int
  counts: tuple[int, ...]
  towers: tuple[int, ...] | None = None
  process_index: int = 0
  process_count: int = 1
  parts: int = 1
  latent_dim: int = 0
  causal: bool = True

  def __post_init__(self):
    """Raises UserError where rows, groups, processes and parts do not divide."""
    check_split(self.group_rows, self.tower_places, self.parts)
    if self.batch_rows % self.group_rows:
      raise UserError(
        f"a batch of config.train.batch_size={self.batch_rows} rows is not a"
        f" whole number of groups of {self.group_rows} rows"
        f" (config.data.group_rows); choose a divisor of {self.batch_rows}"
      )
    if self.batch_groups % self.process_count:
      raise UserError(
        f"{self.process_count} processes cannot share the"
        f" {self.batch_rows} / {self.group_rows} = {self.batch_groups} groups of"
        f" a batch equally; make config.train.batch_size a multiple of"
        f" {self.process_count * self.group_rows} or config.data.group_rows"
        f" smaller"
      )

  @property
  def tower_places(self) -> tuple[int, ...]:
    """Places of each tower in a group; of all of them without towers."""
    if self.towers is None:
      return (self.group_rows * self.row_length,)
    return tower_counts(self.counts, self.towers)

  @property
  def batch_groups(self) -> int:
    """Groups of a step, over all processes."""
    return self.batch_rows // self.group_rows


def abstract_batch(rows: Rows) -> Batch:
  """Shapes and dtypes of the whole batch of all processes.

  Args:
    rows: shapes and shares.
  """

  def shape_of(*shape: int, dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)

  size = (rows.batch_rows, rows.row_length)
  layout = None
  if rows.towers is not None:
    groups, places = rows.batch_groups, rows.tower_places
    layout = Layout(
      tuple(shape_of(groups, count) for count in places),
      shape_of(groups, sum(places)),
    )
  width = rows.latent_dim
  return Batch(
    *(shape_of(*size) for _ in range(7)),
    weight=shape_of(*size, dtype=np.float32),
    layout=layout,
    latents=shape_of(*size, width, dtype=np.float32) if width else None,
    span=shape_of(*size) if width else None,
    stored=shape_of(*size) if rows.parts > 1 else None,
  )


class Loader:
  """`loader[step]` is this process's part of the step's batch (numpy).

  Attributes:
    layout_counts: places of each modality in a group.
    vocabulary: the shared vocabulary.
    rows: shapes and shares.
  """

  def __init__(
    self,
    streams: Sequence[Stream],
    records: Sequence[RecordReader],
    vocabulary: Vocabulary,
    rows: Rows,
    *,
    seed: int,
    chances: Chances,
    lookahead: int,
    prefetch: int = 0,
    one_pass: bool = False,
  ):
    """Makes a loader; planning starts when the first batch is asked for.

    Args:
      streams: the sources of the mixture.
      records: random access to each source's records, in the same order.
      vocabulary: the shared vocabulary.
      rows: shapes and shares.
      seed: root of order and draws.
      chances: probabilities of the draws about captions.
      lookahead: documents among which the plan chooses.
      prefetch: batches made ahead by `iterate`.
      one_pass: every document once, in stored order, then the end; otherwise
        the loader has no end.
    """
    self.vocabulary = vocabulary
    self.rows = rows
    self.layout_counts = rows.counts
    self._streams = tuple(streams)
    self._records = tuple(records)
    self._seed = seed
    self._chances = chances
    self._lookahead = lookahead
    self._prefetch = prefetch
    self._one_pass = one_pass
    self._lock = threading.Lock()
    self._planner = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="plan"
    )
    self._plans: collections.OrderedDict[
      int, concurrent.futures.Future[Plan]
    ] = collections.OrderedDict()
    # First step of each epoch that is known, and the end of the last of them.
    self._starts = [0]

  def __len__(self) -> int:
    """Steps of the only pass; of an endless loader, the most there can be."""
    return self.steps_in_epoch(0) if self._one_pass else sys.maxsize

  def __getitem__(self, step: int) -> Batch:
    epoch, index = self._locate(step)
    plan = self.plan(epoch)
    if not self._one_pass:
      self._request(epoch + 1)
    share = self.rows.batch_groups // self.rows.process_count
    first = index * self.rows.batch_groups + self.rows.process_index * share
    return self._batch(plan, first, share)

  def iterate(self, start_step: int = 0) -> Iterator[Batch]:
    """Batches from a step on, made ahead by threads.

    Args:
      start_step: the first step; the state of the iterator is one number.
    """
    steps = grain.MapDataset.range(start_step, len(self)).map(self.__getitem__)
    return iter(
      steps.to_iter_dataset(
        grain.ReadOptions(
          num_threads=min(self._prefetch, 2),
          prefetch_buffer_size=self._prefetch,
        )
      )
    )

  def plan(self, epoch: int) -> Plan:
    """The epoch's plan, waiting for it where it is being made."""
    return self._request(epoch).result()

  def steps_in_epoch(self, epoch: int) -> int:
    """Batches of an epoch; its last is completed by empty groups."""
    return -(-self.plan(epoch).num_groups // self.rows.batch_groups)

  def epoch_of(self, step: int) -> int:
    """The epoch that a step belongs to."""
    return self._locate(step)[0]

  def fill(self, step: int) -> dict[str, float]:
    """Real tokens over places of each modality in the step's whole batch."""
    epoch, index = self._locate(step)
    first = index * self.rows.batch_groups
    used = self.plan(epoch).used[first : first + self.rows.batch_groups].sum(0)
    return {
      name: float(used[m] / (self.rows.batch_groups * places))
      for m, (name, places) in enumerate(
        zip(self.vocabulary.modalities, self.layout_counts, strict=True)
      )
      if places
    }

  def _request(self, epoch: int) -> "concurrent.futures.Future[Plan]":
    """Starts the epoch's plan where it is neither kept nor being made."""
    with self._lock:
      if epoch not in self._plans:
        self._plans[epoch] = self._planner.submit(
          plan_epoch,
          self._streams,
          seed=self._seed,
          epoch=epoch,
          chances=self._chances,
          counts=self.rows.counts,
          row_length=self.rows.row_length,
          group_rows=self.rows.group_rows,
          lookahead=self._lookahead,
          shuffle=not self._one_pass,
        )
        while len(self._plans) > _PLANS_KEPT:
          self._plans.popitem(last=False)
      self._plans.move_to_end(epoch)
      return self._plans[epoch]

  def _locate(self, step: int) -> tuple[int, int]:
    """Epoch of a step and the step's index within it."""
    if step < 0:
      raise IndexError(f"step {step} is negative")
    while step >= self._starts[-1]:
      epoch = len(self._starts) - 1
      if self._one_pass and epoch:
        raise IndexError(f"step {step} of {self._starts[-1]} steps")
      end = self._starts[epoch] + self.steps_in_epoch(epoch)
      with self._lock:
        if len(self._starts) == epoch + 1:
          self._starts.append(end)
    epoch = bisect.bisect_right(self._starts, step) - 1
    return epoch, step - self._starts[epoch]

  def _batch(self, plan: Plan, first: int, groups: int) -> Batch:
    """The rows of some consecutive groups; groups beyond the plan are empty."""
    rows = self.rows
    shape = (groups * rows.group_rows, rows.row_length)
    tokens = np.full(shape, self.vocabulary.pad, np.int32)
    segment = np.zeros(shape, np.int32)
    position = np.zeros(shape, np.int32)
    latents = None
    if rows.latent_dim:
      latents = np.zeros((*shape, rows.latent_dim), np.float32)
    begin = min(first, plan.num_groups) * rows.group_rows
    end = min(first + groups, plan.num_groups) * rows.group_rows
    pieces = slice(plan.row_start[begin], plan.row_start[end])
    read = iter(self._documents(plan, pieces))
    for row in range(end - begin):
      low, high = plan.row_start[begin + row : begin + row + 2]
      column = 0
      for number in range(high - low):
        piece, values = next(read)
        until = column + len(piece)
        tokens[row, column:until] = piece
        if latents is not None:
          where = np.isin(
            self.vocabulary.modality_of(piece), self.vocabulary.continuous
          )
          latents[row, column:until][where] = values
        segment[row, column:until] = number + 1
        position[row, column:until] = np.arange(len(piece))
        column = until
    batch = packed_batch(
      tokens,
      segment,
      position,
      self.vocabulary,
      towers=rows.towers,
      counts=rows.tower_places if rows.towers else (),
      group_rows=rows.group_rows,
      latents=latents,
      causal=rows.causal,
    )
    return split_rows(batch, rows.parts)

  def _documents(
    self, plan: Plan, pieces: slice
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and latents of consecutive pieces of a plan."""
    source, document = plan.source[pieces], plan.document[pieces]
    nothing = np.zeros(0, np.int32), np.zeros((0, 0), np.float32)
    read = [nothing] * len(source)
    for index, stream in enumerate(self._streams):
      here = np.flatnonzero(source == index)
      draws = docs.draw(
        stream.counts,
        document[here],
        plan.passes[pieces][here],
        seed=self._seed,
        source=docs.stream_key(stream.name),
        chances=self._chances,
      )
      parts = docs.offsets(stream.counts.parts[document[here]])
      for n, piece in enumerate(here):
        record = self._records[index][int(document[piece])]
        order: dict[str, Any] = {
          "reversed": bool(draws.reversed[n]),
          "alternative": draws.alternative[parts[n] : parts[n + 1]],
        }
        whole = docs.document_ids(
          record, self.vocabulary, dropped=bool(draws.dropped[n]), **order
        )
        part = slice(plan.start[pieces][piece], plan.stop[pieces][piece])
        # What is torn is of text alone.
        values = docs.document_latents(record, self.vocabulary, **order)
        read[piece] = whole[part], values
    return read
