"""The baseline of code models: each code by its frequency in training."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.data.documents import Record, offsets
from fusionlab.data.preparation import Prepared
from fusionlab.errors import UserError


def unigram(
  prepared: Mapping[str, Prepared],
  vocabulary: Vocabulary,
  *,
  modality: str = "image",
  split: str = "train",
  limit: int = 0,
) -> Float[np.ndarray, " _"]:
  """Estimates log p of every code of a modality by counting.

  Add-one smoothing (Laplace): p(v) = (count(v) + 1) / (total + codes). Every
  record counts once, whatever its source's weight in the mixture.

  Args:
    prepared: the sources' prepared datasets, by name.
    vocabulary: the shared vocabulary.
    modality: whose codes; not the text.
    split: where they are counted.
    limit: records of each source that are read, evenly spaced; 0: all.

  Returns:
    float64 [codes of the modality], nats.

  Raises:
    UserError: an unknown modality, or the text.
  """
  kind = vocabulary.index(modality)
  if kind == 0:
    raise UserError(
      f"modality {modality!r} is the text; the unigram baseline is for codes"
      f" ({', '.join(vocabulary.modalities[1:]) or 'none here'})"
    )
  seen = np.ones(vocabulary.sizes[kind])
  for source in prepared.values():
    if split not in source.splits:
      continue
    records = source.records(split)
    rows = np.flatnonzero(source.counts(split).pictured)
    if limit and len(rows) > limit:
      rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    for row in rows:
      codes = _codes(records[int(row)], kind) - vocabulary.offset(kind)
      seen += np.bincount(codes, minlength=len(seen))
  return np.log(seen / seen.sum())


def _codes(record: Record, kind: int) -> Int[np.ndarray, " _"]:
  """The ids of all alternatives of the record's parts of one modality."""
  part = np.repeat(record.part_modality, record.part_alternatives)
  return record.ids[np.repeat(part == kind, np.diff(offsets(record.lengths)))]


def unigram_nll(
  table: Float[np.ndarray, " _"],
  codes: Int[np.ndarray, " C"],
  vocabulary: Vocabulary,
  *,
  modality: str = "image",
) -> float:
  """-log p of a picture's codes under the unigram, nats, summed.

  Args:
    table: what `unigram` returned.
    codes: ids in the shared vocabulary.
    vocabulary: the shared vocabulary.
    modality: of the codes.
  """
  return -float(
    table[codes - vocabulary.offset(vocabulary.index(modality))].sum()
  )
