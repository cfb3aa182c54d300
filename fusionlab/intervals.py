"""Where documents and continuous spans begin and end in their rows."""

import numpy as np
from jaxtyping import Bool, Int


def causal_intervals(
  segment: Int[np.ndarray, "B L"], position: Int[np.ndarray, "B L"]
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
  """Keys a causal query sees: its document's start up to and with itself.

  Args:
    segment: document within the row, from 1; 0 is padding.
    position: position within the document.

  Returns:
    int32 `k_start`, `k_end`; both 0 on padding.
  """
  column = np.arange(segment.shape[1], dtype=np.int32)[None]
  real = segment > 0
  k_start = np.where(real, column - position, 0).astype(np.int32)
  k_end = np.where(real, column + 1, 0).astype(np.int32)
  return k_start, k_end


def continuous_spans(
  inside: Bool[np.ndarray, "B L"], segment: Int[np.ndarray, "B L"]
) -> tuple[
  Int[np.ndarray, "B L"], Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]
]:
  """Runs of continuous positions: which, from where and until where.

  Args:
    inside: continuous positions.
    segment: what a span ends with where it changes: its document and modality.

  Returns:
    int32 number of the span within its row, from 1, its first position, and one
    past its last; all 0 outside.
  """
  length = inside.shape[1]
  column = np.arange(length)
  other = np.diff(segment, axis=1, prepend=-1) != 0
  before = np.pad(inside, ((0, 0), (1, 0)))[:, :-1]
  starts = inside & (other | ~before)
  first = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
  after = np.pad(~inside | starts, ((0, 0), (0, 1)), constant_values=True)
  bound = np.where(after, np.arange(length + 1), length)[:, ::-1]
  end = np.minimum.accumulate(bound, axis=1)[:, ::-1][:, 1:]
  number = np.cumsum(starts, axis=1)
  number, first, end = (
    np.where(inside, x, 0).astype(np.int32) for x in (number, first, end)
  )
  return number, first, end
