"""The page that compares runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fusionlab.errors import UserError
from fusionlab.report import panels, samples, scores, settings, summary
from fusionlab.report.page import configuration, templates, write_page
from fusionlab.report.records import Run, read_run
from fusionlab.report.samples import Drawn, Samples
from fusionlab.report.scores import Score, Scores

# Captions of a split that are shown: runs multiply the pictures.
_MOST_CAPTIONS = 8


@dataclasses.dataclass(frozen=True)
class Shared:
  """Captions of one split that at least two runs drew.

  Attributes:
    name, note: see `fusionlab.report.scores`.
    number: how many there are.
    rows: (an entry with caption and picture, each run's entry or None), the
      first few of them.
  """

  name: str
  note: str
  number: int
  rows: list[tuple[Drawn, list[Drawn | None]]]


def write(workdirs: Sequence[str | Path], out: str | Path) -> Path:
  """Writes a page that compares runs; see `fusionlab.report.compare`."""
  if len(workdirs) < 2:
    raise UserError(
      f"{len(workdirs)} workdir given; comparing takes two or more"
    )
  seen: dict[Path, str | Path] = {}
  for workdir in workdirs:
    folder = Path(workdir).expanduser().resolve()
    if folder in seen:
      raise UserError(
        f"{workdir} and {seen[folder]} are one folder; give each run once"
      )
    seen[folder] = workdir
  path = Path(out).expanduser()
  write_page(path, render([read_run(workdir) for workdir in workdirs]))
  return path


def render(runs: Sequence[Run]) -> str:
  """The whole HTML; the same files give the same text.

  Args:
    runs: two or more, in the order of columns.

  Raises:
    UserError: an evaluation.json or samples.json of another format.
  """
  names = labels(runs)
  scored = [scores.scores_of(run) for run in runs]
  sampled = [
    samples.samples_of(run, found)
    for run, found in zip(runs, scored, strict=True)
  ]
  return templates().get_template("comparison.html").render(
    runs=runs,
    labels=names,
    headlines=[dict(summary.headline(run)) for run in runs],
    differences=settings.compared([run.config for run in runs]),
    charts=panels.of_several([run.metrics for run in runs], names),
    scores=scored,
    table=table(scored),
    configurations=[configuration(run) for run in runs],
    samples=sampled,
    shared=shared_captions(sampled),
  )  # fmt: skip


def labels(runs: Sequence[Run]) -> list[str]:
  """Short names of runs: of folders, or paths where two have one name."""
  names = [run.name for run in runs]
  return [
    name if names.count(name) == 1 else str(run.folder)
    for name, run in zip(names, runs, strict=True)
  ]


def table(
  scored: Sequence[Scores | None],
) -> list[tuple[str, str, list[Score | None]]]:
  """Joins held-out scores.

  Args:
    scored: of each run.

  Returns:
    (metric, split, each run's score or None), metric by metric.
  """
  metrics: dict[str, dict[str, None]] = {}
  for found in scored:
    for metric, by_split in found.table.items() if found else ():
      metrics.setdefault(metric, {}).update(dict.fromkeys(by_split))
  return [
    (metric, split, [f.get(metric, split) if f else None for f in scored])
    for metric, splits in metrics.items()
    for split in sorted(splits, key=lambda split: split != scores.POOLED)
  ]


def shared_captions(
  several: Sequence[Samples | None], limit: int = _MOST_CAPTIONS
) -> list[Shared]:
  """Finds captions that at least two runs drew.

  Args:
    several: samples of each run; None where a run has none.
    limit: captions of a split at most.
  """
  splits: dict[str, list[dict[tuple[str, str], Drawn]]] = {}
  for index, found in enumerate(several):
    for grid in found.grids if found else ():
      each = splits.setdefault(grid.split, [{} for _ in several])
      each[index] = {(d.key, d.caption): d for d in grid.drawn}
  shared = []
  for split, each in splits.items():
    names: dict[tuple[str, str], None] = {}
    for entries in each:
      names.update(dict.fromkeys(entries))
    rows = []
    for name in names:
      row = [entries.get(name) for entries in each]
      drawn = [entry for entry in row if entry is not None]
      if len(drawn) > 1:
        rows.append((drawn[0], row))
    if rows:
      title, note = scores.split_name(split), scores.split_note(split)
      shared.append(Shared(title, note, len(rows), rows[:limit]))
  return shared
