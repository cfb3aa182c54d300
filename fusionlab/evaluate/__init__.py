"""Scores a workdir: `--mode=evaluate`, and `run` for library users."""

from typing import Any


def run(workdir: str, *arguments: Any, **options: Any) -> dict[str, Any]:
  """Scores a workdir's checkpoint; see `fusionlab.evaluate.scoring.run`."""
  from fusionlab.evaluate import scoring

  return scoring.run(workdir, *arguments, **options)
