"""The folder of a run: whose it is, what may change on resume, its status."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionlab import processes
from fusionlab.config import flatten, to_mapping
from fusionlab.errors import ConfigError, UserError
from fusionlab.experiment import Experiment
from fusionlab.train import text_first
from fusionlab.train.writers import write_atomic

# What may differ when a run goes on. Whatever is not here decides the numbers.
CHANGEABLE = frozenset(
  {
    "train.num_steps",
    "train.max_seconds",
    "train.writers",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.eval_batches",
    "train.keep_checkpoints",
    "train.profile_start",
    "train.profile_steps",
    "train.compile_cache",
    "train.peer_timeout",
    "data.cache_dir",
    "data.prefetch",
    # Their content is compared with what the checkpoint holds.
    "data.text_tokenizer",
    "data.image_tokenizer",
  }
)
# Network file systems show a new file on other hosts after some seconds.
_SEEN_WITHIN_S = 20.0
_CHANGEABLE_SECTIONS = ("mesh.", "evaluate.")


def may_change(key: str) -> bool:
  """Says whether a flat key ('train.num_steps') may differ on resume."""
  return key in CHANGEABLE or key.startswith(_CHANGEABLE_SECTIONS)


def resolve(experiment: Experiment, group_rows: int) -> Experiment:
  """Writes derived values in the place of their zeros.

  Args:
    experiment: as given; `schedule_steps` 0 becomes `num_steps`.
    group_rows: rows of a group, where `data.group_rows` is 0.
  """
  train, data = experiment.train, experiment.data
  return dataclasses.replace(
    experiment,
    train=dataclasses.replace(
      train, schedule_steps=train.schedule_steps or train.num_steps
    ),
    data=dataclasses.replace(data, group_rows=data.group_rows or group_rows),
  )


def recorded(workdir: Path) -> Experiment | None:
  """Reads `<workdir>/config.json`; None where there is no run yet.

  Raises:
    UserError: a non-empty folder or a file that is not ours.
  """
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir {workdir} is a file; give a folder")
  path = workdir / "config.json"
  if not path.exists():
    if (workdir / "checkpoints" / "0").is_dir():
      raise UserError(
        f"--workdir {workdir} holds imported weights and no run; train from"
        f" them by --config.init.checkpoint={workdir} and another --workdir"
      )
    found = _foreign(workdir)
    if found:
      raise UserError(
        f"--workdir {workdir} is not empty ({found[0]}, …) and holds no run of"
        f" ours (no config.json); give an empty or a new folder"
      )
    return None
  try:
    return Experiment.from_mapping(json.loads(path.read_text("utf-8")))
  except (ValueError, ConfigError) as error:
    raise UserError(
      f"{path} is not a configuration of this fusionlab ({error}); give another"
      f" --workdir"
    ) from error


def _foreign(workdir: Path) -> list[str]:
  """Names in a folder that a start killed before config.json cannot leave."""
  if not workdir.exists():
    return []
  ours = (".lock", "status.json", text_first.FOLDER)
  return sorted(
    p.name
    for p in workdir.iterdir()
    if p.name not in ours and not p.name.endswith(".tmp")
  )


def resume(given: Experiment, before: Experiment, workdir: Path) -> Experiment:
  """Joins what was recorded with what may change.

  Args:
    given: the configuration of this start, derived values still 0.
    before: the resolved one of the first start.
    workdir: for the message.

  Returns:
    `given`, derived values as at the first start.

  Raises:
    UserError: lists every other key that differs, with both values.
  """
  derived = before.train.schedule_steps, before.data.group_rows
  joined = dataclasses.replace(
    given,
    train=dataclasses.replace(
      given.train, schedule_steps=given.train.schedule_steps or derived[0]
    ),
    data=dataclasses.replace(
      given.data, group_rows=given.data.group_rows or derived[1]
    ),
  )
  old, new = flatten(to_mapping(before)), flatten(to_mapping(joined))
  missing = "(absent)"
  differ = [
    f"config.{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
    for key in sorted(old.keys() | new.keys())
    if not may_change(key) and old.get(key, missing) != new.get(key, missing)
  ]
  if differ:
    raise UserError(
      f"--workdir {workdir} holds a run of another config; these keys may not"
      f" change on resume: {'; '.join(differ)}. Give another --workdir or the"
      f" old values"
    )
  return joined


def check_inputs(
  path: Path,
  meta: Mapping[str, Any],
  tokenizers: str,
  sources: Mapping[str, str],
) -> None:
  """Compares what a checkpoint was trained on with what this start reads.

  Args:
    path: the checkpoint's folder, for the message.
    meta: its meta.json.
    tokenizers: hash of the tokenizers.
    sources: fingerprint of each source of data.

  Raises:
    UserError: other tokenizers, or a source that changed: the same documents
      could not follow.
  """
  if meta["tokenizers"] != tokenizers:
    raise UserError(
      f"{path} was trained with other tokenizers than"
      f" config.data.text_tokenizer and image_tokenizer name now; point them"
      f" at the files in {path / 'tokenizers'}"
    )
  recorded = meta["sources"]
  differ = [n for n in sources if sources[n] != recorded.get(n)]
  if differ:
    raise UserError(
      f"{path} was trained on other data: the source(s) {', '.join(differ)}"
      f" changed since, so the same documents cannot follow; restore the files"
      f" or the package's version, or give another --workdir"
    )


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file atomically."""
  write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_status(
  workdir: Path, status: str, step: int, reason: str = ""
) -> None:
  """Writes `status.json`.

  Args:
    workdir: the run's folder.
    status: running | finished | preempted | failed.
    step: optimizer steps taken.
    reason: 'num_steps', 'max_seconds', 'SIGTERM' or an error's first line.
  """
  content = {"status": status, "step": step, "reason": reason}
  write_json(workdir / "status.json", content)


def record_start(
  workdir: Path, step: int, environment: Mapping[str, Any]
) -> None:
  """Adds a line to `starts.jsonl`, which tells a run's starts and resumes.

  Args:
    workdir: the run's folder.
    step: step it starts from.
    environment: of `fusionlab.train.environment.describe`.
  """
  devices = environment["devices"]
  line = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "step": step,
    "commit": environment["commit"],
    "command": environment["command"],
    "device": f"{devices['count']} x {devices['kind']}",
  }
  with (workdir / "starts.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")


def finished_at(workdir: Path) -> int | None:
  """The step at which a run finished, all its scores taken; else None."""
  try:
    content = json.loads((workdir / "status.json").read_text("utf-8"))
    return content["step"] if content["status"] == "finished" else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def status_of(workdir: Path) -> str:
  """The word in `status.json`; '' where there is none."""
  try:
    return json.loads((workdir / "status.json").read_text("utf-8"))["status"]
  except (OSError, ValueError, KeyError, TypeError):
    return ""


@contextlib.contextmanager
def seen_by_all(workdir: Path) -> Iterator[None]:
  """Refuses a workdir that is another folder on another process's host.

  Args:
    workdir: exists on process 0.

  Raises:
    UserError: on a process that does not see what process 0 puts there.
  """
  if not processes.name():
    yield
    return
  # A fresh name, which no file system has cached as missing.
  mark = workdir / processes.from_first(lambda: f".job-{uuid.uuid4().hex}.tmp")
  try:
    if processes.is_first():
      for old in workdir.glob(".job-*.tmp"):  # of starts that were killed
        old.unlink(missing_ok=True)
      mark.touch()
    processes.from_first(lambda: None)
    until = time.monotonic() + _SEEN_WITHIN_S
    while not mark.exists():
      if time.monotonic() > until:
        raise UserError(
          f"--workdir {workdir} is another folder here than on process 0;"
          f" several processes need one that all of them see"
        )
      time.sleep(0.5)
    yield
  finally:
    if processes.is_first():
      mark.unlink(missing_ok=True)


class Lock:
  """Keeps a second process out of a workdir; the system drops it at exit."""

  def __init__(self, workdir: Path):
    """Takes the lock.

    Raises:
      UserError: another process trains here, or the folder cannot be written.
    """
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      self._file = (workdir / ".lock").open("a", encoding="utf-8")
    except OSError as error:
      raise UserError(
        f"cannot write into --workdir {workdir}: {error}; give another folder"
      ) from error
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._file.close()
      raise UserError(
        f"another process is training in --workdir {workdir}; wait for it or"
        f" give another folder"
      ) from error

  def release(self) -> None:
    """Lets the next process in."""
    self._file.close()
