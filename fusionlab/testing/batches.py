"""Random packed batches of any interleaving, for tests and benchmarks."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fusionlab.batch import Batch, Vocabulary, packed_batch
from fusionlab.routing import Layout, make_layout


def random_batch(
  rng: np.random.Generator,
  vocabulary: Vocabulary,
  *,
  rows: int,
  length: int,
  towers: Sequence[int],
  group_rows: int | None = None,
  padding: int = 0,
  present: Sequence[int] | None = None,
  documents: int = 1,
) -> Batch:
  """Draws a batch whose modalities are interleaved at random.

  Args:
    rng: source of randomness.
    vocabulary: ids of each modality are drawn from its range.
    rows: B.
    length: L.
    towers: tower of each modality; one tower makes no layout.
    group_rows: rows per layout group; default all. Every group has the same
      number of tokens per modality, as the plan makes it.
    padding: positions at the end of each row that are padding.
    present: modalities that occur; default all.
    documents: documents per row, of about equal length.

  Returns:
    A numpy batch; its layout's counts are the tokens of each tower, padding
    going to the first.
  """
  group_rows = group_rows or rows
  present = range(len(vocabulary.modalities)) if present is None else present
  size = group_rows * (length - padding)
  ids = np.resize(np.asarray(present, np.int32), size)
  modality = np.zeros((rows, length), np.int32)
  for start in range(0, rows, group_rows):
    modality[start : start + group_rows, : length - padding] = rng.permutation(
      ids
    ).reshape(group_rows, -1)
  column = np.arange(length, dtype=np.int32)
  per_document = -(-(length - padding) // documents)
  segment = np.where(column < length - padding, column // per_document + 1, 0)
  segment = np.broadcast_to(segment, (rows, length)).astype(np.int32)
  position = np.where(segment > 0, column % per_document, 0).astype(np.int32)
  offsets = np.asarray(
    [vocabulary.offset(m) for m in range(len(vocabulary.modalities))]
  )
  drawn = rng.integers(0, np.asarray(vocabulary.sizes)[modality])
  tokens = np.where(segment > 0, offsets[modality] + drawn, 0).astype(np.int32)
  batch = packed_batch(tokens, segment, position, vocabulary)
  return dataclasses.replace(
    batch, layout=layout_of(modality, segment > 0, towers, group_rows)
  )


def layout_of(
  modality: np.ndarray,
  real: np.ndarray,
  towers: Sequence[int],
  group_rows: int,
) -> Layout | None:
  """The tightest layout that every group fits; None with one tower.

  Args:
    modality: int32 [B, L].
    real: bool [B, L], False on padding.
    towers: tower of each modality.
    group_rows: rows per group.
  """
  if max(towers) == 0:
    return None
  tower = np.asarray(towers)[modality].reshape(
    -1, group_rows * modality.shape[1]
  )
  used = real.reshape(tower.shape)
  counts = [
    int(((tower == k) & used).sum(1).max()) for k in range(max(towers) + 1)
  ]
  counts[0] += tower.shape[1] - sum(counts)
  return make_layout(
    modality, real, towers=towers, counts=counts, group_rows=group_rows
  )
