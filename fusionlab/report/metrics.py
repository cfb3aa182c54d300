"""Rows of metrics.csv or metrics.jsonl as columns, and sums over them."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.errors import UserError

# Larger values are drawn by no axis.
_LARGEST = 1e30


@dataclasses.dataclass(frozen=True)
class Metrics:
  """Metrics by name.

  Attributes:
    steps: int64 [N], ascending, each once.
    columns: name -> float64 [N]; nan where a row lacks the metric.
    nonfinite: name -> first step whose value was recorded and not finite.
  """

  steps: np.ndarray
  columns: dict[str, np.ndarray]
  nonfinite: dict[str, int]

  def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it is finite; empty if unknown."""
    if name not in self.columns:
      return np.zeros(0, np.int64), np.zeros(0)
    values = self.columns[name]
    kept = np.abs(values) < _LARGEST  # false for nan
    return self.steps[kept], values[kept]

  def last(self, name: str) -> float | None:
    """The newest finite value of a metric; None where there is none."""
    values = self.series(name)[1]
    return float(values[-1]) if len(values) else None

  def newest_row(self, prefix: str) -> tuple[int, dict[str, float]] | None:
    """The newest row with a metric of a prefix.

    Args:
      prefix: 'eval/'.

    Returns:
      Its step and those metrics; None where no row has one.
    """
    names = [name for name in self.columns if name.startswith(prefix)]
    for row in range(len(self.steps) - 1, -1, -1):
      found = {name: float(self.columns[name][row]) for name in names}
      found = {name: v for name, v in found.items() if math.isfinite(v)}
      if found:
        return int(self.steps[row]), found
    return None

  def intervals(self) -> tuple[np.ndarray, np.ndarray]:
    """Training rows: row numbers, and the steps that each row stands for."""
    rows = np.flatnonzero(~np.isnan(self.column("train/loss")))
    return rows, np.diff(self.steps[rows], prepend=0)

  def column(self, name: str) -> np.ndarray:
    """A metric in every row; nan throughout where it is unknown."""
    return self.columns.get(name, np.full(len(self.steps), math.nan))

  def tokens_seen(self) -> float | None:
    """Real tokens trained on, from speed and duration of logged intervals."""
    per_step = self.column("perf/tokens_per_s") * self.column("perf/step_s")
    rows, steps = self.intervals()
    per_step = per_step[rows]
    known = np.isfinite(per_step)
    if not steps[known].sum():
      return None
    # An interval without speed (a first step) counts as the others' mean.
    mean = (per_step[known] * steps[known]).sum() / steps[known].sum()
    return float((np.where(known, per_step, mean) * steps).sum())

  def seconds(self) -> tuple[float, float]:
    """Seconds in training steps and in evaluations, as far as logged."""
    rows, steps = self.intervals()
    training = self.column("perf/step_s")[rows] * steps
    evaluating = self.column("perf/eval_s")
    return float(np.nansum(training)), float(np.nansum(evaluating))


def read_metrics(folder: Path) -> Metrics:
  """Reads metrics.csv, or metrics.jsonl where the run wrote no CSV.

  Lines torn by a crash are left out; rows of one step are joined.

  Args:
    folder: the workdir.

  Raises:
    UserError: a metrics.csv that does not begin with a column `step`.
  """
  rows: dict[int, dict[str, float]] = {}
  for path, reader in (
    (folder / "metrics.csv", _csv_rows),
    (folder / "metrics.jsonl", _jsonl_rows),
  ):
    if path.is_file():
      for step, row in reader(path):
        rows.setdefault(step, {}).update(row)
    if rows:
      break
  steps = sorted(rows)
  columns: dict[str, np.ndarray] = {}
  nonfinite: dict[str, int] = {}
  for index, step in enumerate(steps):
    for name, value in rows[step].items():
      if name not in columns:
        columns[name] = np.full(len(steps), math.nan)
      columns[name][index] = value
      if not math.isfinite(value):
        nonfinite.setdefault(name, step)
  return Metrics(np.array(steps, np.int64), columns, nonfinite)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
  with open(path, newline="", encoding="utf-8", errors="replace") as file:
    table = csv.reader(line.replace("\0", "") for line in file)
    header = next(table, ["step"])
    if header[:1] != ["step"]:
      raise UserError(
        f"{path} does not begin with a column 'step', so no run wrote it;"
        f" restore it, or move it away"
      )
    for cells in table:
      if len(cells) == len(header) and cells[0].isdecimal():
        pairs = zip(header[1:], cells[1:], strict=True)
        yield int(cells[0]), {n: _number(c) for n, c in pairs if c}


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
  for line in path.read_text("utf-8", errors="replace").splitlines():
    try:
      row = json.loads(line)
      step = int(row.pop("step"))
    except (ValueError, KeyError, TypeError, AttributeError):
      continue
    yield step, {name: _number(value) for name, value in row.items()}


def _number(cell: Any) -> float:
  """A cell's value; null and what is no number are not finite."""
  try:
    return float(cell)
  except (TypeError, ValueError):
    return math.nan
