"""Scores a checkpoint on everything held out, and shows a table."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from fusionlab.errors import UserError
from fusionlab.evaluate.heldout import evaluate
from fusionlab.experiment import Experiment
from fusionlab.sharding import rules
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train.metrics import Row
from fusionlab.train.setup import build
from fusionlab.train.step import make_eval_step
from fusionlab.train.workdir import write_json


def run(
  workdir: str,
  experiment: Experiment | None = None,
  *,
  step: int | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Scores one checkpoint of a workdir on all held-out batches.

  Args:
    workdir: the run's folder.
    experiment: where given, its `mesh`, `data.cache_dir` and `data.prefetch`
      are used; everything else is as the checkpoint recorded it.
    step: which checkpoint; None takes the newest good one.
    console: where the table goes; default standard output.

  Returns:
    {"step", "checkpoint", "metrics"}, which is also written to
    `<workdir>/evaluation.json`. The moving average of the parameters is scored
    where one is kept.

  Raises:
    UserError: no such checkpoint, or a corrupted one.
  """
  folder = Path(workdir).expanduser()
  path = folder
  if step is not None:
    path = folder / "checkpoints" / str(step)
    if not path.is_dir():
      have = checkpoints.steps_in(folder / "checkpoints")
      raise UserError(
        f"{folder} has no checkpoint of step {step}; it has"
        f" {', '.join(map(str, have)) or 'none'}"
      )
  path = checkpoints.find(path)
  loaded = checkpoints.load(path)
  setup = build(
    _placed(loaded.experiment, experiment), tokenizers=loaded.tokenizers
  )
  params = loaded.params if loaded.ema is None else loaded.ema
  params = jax.device_put(
    params,
    rules.param_shardings(setup.model.param_axes(), params, setup.mesh),
  )
  row = evaluate(
    make_eval_step(setup.model, setup.objective, mesh=setup.mesh),
    params,
    setup.data.heldout,
    setup.data.uncaptioned,
    setup.mesh,
    codes_per_picture=setup.tokenizers.image.codes_per_image,
  )
  result = {"step": loaded.step, "checkpoint": str(path), "metrics": row}
  if jax.process_index() == 0:
    (console or Console()).print(table(row, loaded.step))
    write_json(folder / "evaluation.json", result)
  return result


def _placed(recorded: Experiment, given: Experiment | None) -> Experiment:
  """The recorded configuration on the devices and caches of this machine."""
  if given is None:
    return recorded
  data = dataclasses.replace(
    recorded.data,
    cache_dir=given.data.cache_dir,
    prefetch=given.data.prefetch,
  )
  return dataclasses.replace(recorded, mesh=given.mesh, data=data)


def table(row: Row, step: int) -> Table:
  """Lays out held-out metrics, one line a metric and one column a split.

  Args:
    row: see `fusionlab.evaluate.heldout.evaluate`.
    step: for the title.
  """
  cells: dict[str, dict[str, float]] = {}
  splits: list[str] = []
  for name, value in row.items():
    group, _, rest = name.partition("/")
    if group != "eval":
      continue
    head, _, tail = rest.partition("/")
    # 'eval/loss/text' is pooled; 'eval/<split>/loss/text' is one split's.
    pooled = rest in _pooled_names(row)
    split, metric = ("all", rest) if pooled else (head, tail)
    if split not in splits:
      splits.append(split)
    cells.setdefault(metric, {})[split] = value
  shown = Table(title=f"held-out, step {step}")
  shown.add_column("metric", no_wrap=True)
  for split in splits:
    shown.add_column(split.removeprefix("heldout_"), justify="right")
  for metric, values in cells.items():
    shown.add_row(
      metric, *(f"{values[s]:.4f}" if s in values else "" for s in splits)
    )
  return shown


def _pooled_names(row: Row) -> set[str]:
  """Metrics that some split has too: their bare names are the pooled ones."""
  names = {n.removeprefix("eval/") for n in row if n.startswith("eval/")}
  return {n for n in names if any(m.endswith(f"/{n}") for m in names)}
