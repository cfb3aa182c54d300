"""The files of a workdir, read without trusting that all of them are there."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from fusionlab.errors import UserError
from fusionlab.report import denoising
from fusionlab.report.metrics import Metrics, read_metrics

_ANY = ("config.json", "status.json")


@dataclasses.dataclass(frozen=True)
class Dump:
  """What a step that was not finite left in `dump/`.

  Attributes:
    step: the step.
    metrics: name -> value as text; empty where it was not written.
  """

  step: int
  metrics: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir's files.

  Attributes:
    folder: as it was given.
    name: the folder's own name.
    config, environment, status: the JSON files; empty where they are missing.
    metrics: rows of metrics.csv, or of metrics.jsonl, as `denoising` names them.
    evaluation: evaluation.json; None before it is scored.
    samples: samples/samples.json; None before it is scored.
    starts: lines of starts.jsonl, oldest first.
    checkpoints: step -> whether it is complete, oldest first.
    vocab_size: ids of the tokenizers; None before the first checkpoint.
    parameters: name -> shape, of the newest checkpoint; empty before the first.
    dumps: steps that were not finite.
  """

  folder: Path
  name: str
  config: dict[str, Any]
  environment: dict[str, Any]
  status: dict[str, Any]
  metrics: Metrics
  evaluation: dict[str, Any] | None
  samples: dict[str, Any] | None
  starts: list[dict[str, Any]]
  checkpoints: dict[int, bool]
  vocab_size: int | None
  parameters: dict[str, list[int]]
  dumps: list[Dump]

  @property
  def step(self) -> int:
    """Steps known to be taken: status.json's, or a later row of metrics."""
    recorded = self.status.get("step")
    recorded = recorded if isinstance(recorded, int) else 0
    return max([recorded, *self.metrics.steps[-1:].tolist()])

  @property
  def has_pictures(self) -> bool:
    """Whether there are pictures to draw; true where that is not known."""
    model = self.config.get("model")
    known = model.get("modalities") if isinstance(model, dict) else None
    return not isinstance(known, list) or "image" in known

  @property
  def scoring_command(self) -> str:
    """What makes the scores and pictures that are missing."""
    folder = shlex.quote(str(self.folder))
    return f"python -m experiments.run --workdir={folder} --mode=evaluate"


def read_run(workdir: str | Path) -> Run:
  """Reads the folder of a run, finished or not.

  Args:
    workdir: the folder.

  Raises:
    UserError: no folder, none of a run, or a file in it that is not readable.
  """
  folder = Path(workdir).expanduser()
  if not folder.is_dir():
    what = "is a file" if folder.exists() else "does not exist"
    raise UserError(
      f"{folder} {what}; give the folder of a run (its --workdir)"
    )
  if not any((folder / name).is_file() for name in _ANY):
    raise UserError(
      f"{folder} holds no run (neither {' nor '.join(_ANY)}); give the folder"
      f" that was a run's --workdir"
    )
  checkpoints = _checkpoints(folder / "checkpoints")
  meta = _newest_meta(folder / "checkpoints", checkpoints)
  return Run(
    folder=folder,
    name=folder.resolve().name,
    config=read_json(folder / "config.json") or {},
    environment=read_json(folder / "environment.json") or {},
    status=read_json(folder / "status.json") or {},
    metrics=denoising.named(read_metrics(folder)),
    evaluation=read_json(folder / "evaluation.json"),
    samples=read_json(folder / "samples" / "samples.json"),
    starts=_starts(folder / "starts.jsonl"),
    checkpoints=checkpoints,
    vocab_size=max((end for _, end in _ranges(meta)), default=None),
    parameters=_parameters(meta),
    dumps=_dumps(folder / "dump"),
  )


def read_json(path: Path) -> dict[str, Any] | None:
  """Reads a JSON object; None where there is no such file.

  Raises:
    UserError: not readable, not JSON, or no object.
  """
  try:
    content = json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(
      f"cannot read {path} ({error.strerror}); make it readable"
    ) from error
  except ValueError as error:
    raise UserError(
      f"{path} is not JSON ({error}); restore it, or move it away to do without"
    ) from error
  if not isinstance(content, dict):
    raise UserError(
      f"{path} holds a {type(content).__name__} where an object is expected;"
      f" restore it, or move it away to do without"
    )
  return content


def not_of_format(path: Path, error: Exception) -> UserError:
  """The error of a file that is JSON but lacks what its maker writes.

  Args:
    path: the file.
    error: what was found wrong.
  """
  return UserError(
    f"{path} is not of the format that --mode=evaluate writes"
    f" ({type(error).__name__}: {error}); make it again, or move it away"
  )


def _checkpoints(folder: Path) -> dict[int, bool]:
  steps = sorted(
    int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir()
  )
  return {s: (folder / str(s) / "checksums.json").is_file() for s in steps}


def _newest_meta(folder: Path, checkpoints: dict[int, bool]) -> dict[str, Any]:
  """meta.json of the newest complete checkpoint that tells its vocabulary."""
  for step in sorted((s for s, whole in checkpoints.items() if whole))[::-1]:
    meta = read_json(folder / str(step) / "meta.json")
    if meta is not None and _ranges(meta):
      return meta
  return {}  # of another version: sizes stay unknown


def _ranges(meta: dict[str, Any]) -> list[tuple[int, int]]:
  """First id and exclusive end of each modality; none of another version."""
  try:
    return [(int(a), int(b)) for a, b in meta["vocabulary"].values()]
  except (KeyError, TypeError, ValueError, AttributeError):
    return []


def _parameters(meta: dict[str, Any]) -> dict[str, list[int]]:
  """Shapes by name; none of another version."""
  try:
    return {
      name: [int(size) for size in one["shape"]]
      for name, one in meta["parameters"].items()
    }
  except (KeyError, TypeError, ValueError, AttributeError):
    return {}


def _starts(path: Path) -> list[dict[str, Any]]:
  """Lines that are objects; one torn by a crash of the machine is left out."""
  if not path.is_file():
    return []
  starts = []
  for line in path.read_text("utf-8", errors="replace").splitlines():
    try:
      start = json.loads(line)
    except ValueError:
      continue
    if isinstance(start, dict):
      starts.append(start)
  return starts


def _dumps(folder: Path) -> list[Dump]:
  dumps = []
  for path in folder.glob("step_*"):
    step = path.name.removeprefix("step_")
    if step.isdigit() and path.is_dir():
      content = read_json(path / "metrics.json") or {}
      dumps.append(Dump(int(step), {k: str(v) for k, v in content.items()}))
  return sorted(dumps, key=lambda dump: dump.step)
