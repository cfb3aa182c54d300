"""Which checkpoint folders are believed: the mark, the checksums, the format.

`checksums.json` holds the SHA-256 of every other file. It is written last and
removed first, so a folder without it is incomplete.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from absl import logging

from fusionlab.errors import UserError

FORMAT = 1
META, SUMS = "meta.json", "checksums.json"


def steps_in(folder: Path) -> list[int]:
  """Steps that have a folder, oldest first, complete or not."""
  if not folder.is_dir():
    return []
  return sorted(
    int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()
  )


def newest(folder: Path) -> Path | None:
  """Finds the newest complete checkpoint and verifies it.

  Args:
    folder: `<workdir>/checkpoints`.

  Returns:
    Its folder; None where there is none. Incomplete newer ones are skipped with
    a line in the log.

  Raises:
    UserError: a complete one with a wrong checksum, see `verify`.
  """
  for step in reversed(steps_in(folder)):
    path = folder / str(step)
    if (path / SUMS).exists():
      verify(path)
      return path
    logging.warning("checkpoint %s is incomplete: skipped", path)
  return None


def verify(path: Path) -> None:
  """Compares every file of one step's folder with its recorded SHA-256.

  Raises:
    UserError: names the first file that is missing or differs, and the way to
      resume from the checkpoint before.
  """
  try:
    sums = json.loads((path / SUMS).read_text("utf-8"))["sha256"]
    bad = next((n for n, s in sums.items() if _sha256(path / n) != s), None)
  except (ValueError, KeyError, AttributeError, TypeError):
    bad = SUMS
  if bad is None:
    return
  before = max(
    (
      s
      for s in steps_in(path.parent)
      if s < _step_of(path) and (path.parent / str(s) / SUMS).exists()
    ),
    default=None,
  )
  way = (
    f"move {path} away to resume from step {before}"
    if before is not None
    else f"no older checkpoint is left: move {path} away to start again"
  )
  raise UserError(
    f"corrupted checkpoint: {path / bad} is missing or does not match its"
    f" checksum; {way}"
  )


def _step_of(path: Path) -> int:
  """The step of a folder; the largest number where it was renamed."""
  return int(path.name) if path.name.isdigit() else 2**63


def read_meta(path: Path) -> dict[str, Any]:
  """Reads `meta.json` of one step's folder.

  Raises:
    UserError: a format that this version does not know.
  """
  meta = json.loads((path / META).read_text("utf-8"))
  if meta.get("format") != FORMAT:
    raise UserError(
      f"{path} has checkpoint format {meta.get('format')!r} and this fusionlab"
      f" reads format {FORMAT}; install the fusionlab that wrote it"
      f" ({meta.get('packages', {}).get('fusionlab', 'version not recorded')})"
    )
  return meta


def find(path: str | Path) -> Path:
  """Finds one verified checkpoint from a path.

  Args:
    path: a workdir, its `checkpoints` folder, or one step's folder wherever it
      was moved.

  Raises:
    UserError: nothing there, or nothing complete, or a wrong checksum.
  """
  path = Path(path)
  if (path / SUMS).exists():
    verify(path)
    return path
  for folder in (path / "checkpoints", path):
    found = newest(folder)
    if found is not None:
      return found
  what = "has no complete checkpoint" if path.is_dir() else "does not exist"
  raise UserError(
    f"{path} {what}; give a workdir, its checkpoints folder or one step's"
    f" folder that holds {SUMS}"
  )


def _sha256(path: Path) -> str | None:
  if not path.is_file():
    return None
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path: Path) -> dict[str, str | None]:
  """SHA-256 of every file below a folder, by relative path."""
  files = sorted(p for p in path.rglob("*") if p.is_file())
  return {p.relative_to(path).as_posix(): _sha256(p) for p in files}
