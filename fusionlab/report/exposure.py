"""How often a run has seen its training pictures, as far as its files tell."""

import math

from fusionlab.errors import UserError
from fusionlab.report.costs import experiment_of
from fusionlab.report.records import Run

# Of the named kinds of sources the one that never has pictures. Any other counts
# as one that may have them, which makes the bounds wider and never wrong.
_TEXT_ALONE = "factbook"

NOT_KNOWN = "Of the training set: what is drawn here may be memory."


def train_note(run: Run, step: int | None) -> str:
  """A sentence on the pictures of the training set.

  Args:
    run: its metrics' `data/epoch`, and its sources' weights.
    step: whose samples are shown; None is the newest.

  Returns:
    The number of passes where the files bound it usefully, else `NOT_KNOWN`.
  """
  bounds = passes(run, step)
  if bounds is None:
    return NOT_KNOWN
  least, most = bounds
  if least:
    times = "once" if least == 1 else f"{least:,} times"
    return (
      f"Trained on at least {times} each: what is drawn here may be memory."
    )
  if most == 1:
    return (
      "Of the training set, and seen at most once each: the run was in its"
      " first pass."
    )
  return NOT_KNOWN


def passes(run: Run, step: int | None) -> tuple[int, int] | None:
  """Least and greatest number of times that a training picture was seen.

  `data/epoch` counts whole epochs before a step, and an epoch passes over each
  source `weight` times: between those of the whole epochs and those of one
  more.

  Args:
    run: see `train_note`.
    step: see `train_note`.

  Returns:
    None where epochs were not recorded, the configuration cannot be read, or
    no source may have pictures.
  """
  steps, epochs = run.metrics.series("data/epoch")
  if step is not None:
    epochs = epochs[steps <= step]
  try:
    sources = experiment_of(run.config).data.sources.values()
  except UserError:  # the page says so where it shows the configuration
    return None
  weights = [s.weight for s in sources if s.weight and s.kind != _TEXT_ALONE]
  if not len(epochs) or not weights:
    return None
  whole = epochs[-1]
  least = min(math.floor(whole * weight) for weight in weights)
  return least, max(math.ceil((whole + 1) * weight) for weight in weights)
