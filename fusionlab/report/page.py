"""The page of one run: `<workdir>/report.html`."""

import functools
import os
from pathlib import Path
from typing import Any

import jinja2

from fusionlab.errors import UserError
from fusionlab.report import (
  costs,
  formatting,
  panels,
  samples,
  scores,
  settings,
  summary,
)
from fusionlab.report.records import Run, read_run


def write(workdir: str | Path, out: str | Path | None = None) -> Path:
  """Writes the report of one run; see `fusionlab.report.write`."""
  run = read_run(workdir)
  path = run.folder / "report.html" if out is None else Path(out).expanduser()
  write_page(path, render(run))
  return path


def render(run: Run) -> str:
  """The whole HTML of one run; the same files give the same text.

  Args:
    run: see `fusionlab.report.records.read_run`.

  Raises:
    UserError: an evaluation.json or samples.json of another format.
  """
  scored = scores.scores_of(run)
  return templates().get_template("report.html").render(
    run=run,
    summary=summary,
    samples=samples.samples_of(run, scored),
    scores=scored,
    charts=panels.of_one(run.metrics),
    **configuration(run),
  )  # fmt: skip


def configuration(run: Run) -> dict[str, Any]:
  """What config.json says: `experiment`, `costs`, and why one is None.

  Args:
    run: its `config`, and what it tells of its vocabulary.

  Returns:
    `kinds` and `differences` (of `fusionlab.report.settings`), `costs`,
    `no_config` and `no_costs`: a sentence where it is missing, else ''.
  """
  found: dict[str, Any] = {
    "costs": None,
    "differences": [],
    "kinds": "",
    "no_config": "",
    "no_costs": "",
  }
  try:
    experiment = costs.experiment_of(run.config)
  except UserError as error:
    return {**found, "no_config": str(error), "no_costs": str(error)}
  found["kinds"] = settings.kinds(experiment)
  found["differences"] = settings.differences(experiment)
  try:
    found["costs"] = costs.costs_of(experiment, run)
  except UserError as error:
    found["no_costs"] = str(error)
  return found


@functools.cache
def templates() -> jinja2.Environment:
  """The package's templates: everything put into them is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals["metric_name"] = scores.metric_name
  environment.globals["split_name"] = scores.split_name
  environment.filters["amount"] = formatting.amount
  environment.filters["number"] = formatting.number
  return environment


def write_page(path: Path, text: str) -> None:
  """Replaces a page in one step, so that a kill leaves the old or the new.

  Args:
    path: the page; its folder exists.
    text: written as UTF-8.

  Raises:
    UserError: it cannot be written.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    try:
      # Text from files may hold halves of characters that UTF-8 has not.
      temporary.write_bytes(text.encode("utf-8", errors="replace"))
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot write {path} ({error.strerror}); give a file in a folder that"
      f" exists and can be written (--out)"
    ) from error
