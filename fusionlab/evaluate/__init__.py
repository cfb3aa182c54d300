"""Scores a workdir: `--mode=evaluate`, and `run` for library users."""

import json
from pathlib import Path
from typing import Any


def run(workdir: str, *arguments: Any, **options: Any) -> dict[str, Any]:
  """Scores a workdir's checkpoint; see `fusionlab.evaluate.scoring.run`."""
  from fusionlab.evaluate import scoring

  return scoring.run(workdir, *arguments, **options)


def evaluated_at(workdir: str) -> int | None:
  """The step of a workdir's last evaluation; None where there is none."""
  try:
    path = Path(workdir).expanduser() / "evaluation.json"
    return json.loads(path.read_text("utf-8"))["step"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


def heldout_at(workdir: str, step: int) -> dict[str, float] | None:
  """Reads the scores of everything held out that a run's end recorded.

  Args:
    workdir: of a finished run.
    step: the one it finished at.

  Returns:
    See `fusionlab.evaluate.heldout.evaluate`; None where the run kept no such row.
  """
  from fusionlab.report.metrics import read_metrics

  last = read_metrics(Path(workdir).expanduser()).newest_row("eval/")
  return last[1] if last and last[0] == step else None
