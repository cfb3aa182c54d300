"""What the kinds that read a user's files share: text, splits, fingerprints."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources.packaged import uniform
from fusionlab.errors import UserError


def decode(data: bytes, where: str) -> str:
  """UTF-8 text without a byte order mark and surrounding white space.

  Args:
    data: bytes.
    where: what names them in a message ("a.txt", "b.jsonl line 3").

  Raises:
    UserError: not UTF-8, or no text at all.
  """
  try:
    text = data.decode("utf-8-sig").strip()
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where} is not UTF-8 (byte {data[error.start]:#04x} at offset"
      f" {error.start}); convert it, e.g. iconv -f latin1 -t utf-8"
    ) from None
  if not text:
    raise UserError(f"{where} has no text; write a caption or remove it")
  return text


def read_bytes(path: Path, where: str, advice: str) -> bytes:
  """Reads a file.

  Raises:
    UserError: it is missing or may not be read.
  """
  try:
    return path.read_bytes()
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise UserError(
      f"{where}: cannot read {path} ({reason}); {advice}"
    ) from None


def content_split(content: bytes, fraction: float) -> str:
  """Whether it is "heldout" or "train", by the content: copies stay together.

  Args:
    content: the picture's bytes, or the text's where there is no picture.
    fraction: the share that is held out.
  """
  key = hashlib.sha256(content).hexdigest()
  return "heldout" if uniform("content", key) < fraction else "train"


def file_facts(files: Iterable[Path], root: Path) -> list[list[str | int]]:
  """Name, size and time of change of files, for a fingerprint."""
  facts = []
  for file in sorted(files):
    stat = file.stat()
    name = file.relative_to(root) if file.is_relative_to(root) else file
    facts.append([name.as_posix(), stat.st_size, stat.st_mtime_ns])
  return facts


def existing(config: SourceConfig, name: str, *, folder: bool) -> Path:
  """The path of a source that reads files.

  Raises:
    UserError: no path, or none of that kind is there.
  """
  key = f"config.data.sources.{name}.path"
  what = "a folder" if folder else "a file"
  if not config.path:
    raise UserError(f"{key} is empty; kind {config.kind!r} needs {what}")
  path = Path(config.path).expanduser()
  if not path.exists():
    raise UserError(f"{key}={config.path!r} does not exist; give {what}")
  if path.is_dir() != folder:
    found = "a folder" if path.is_dir() else "a file"
    raise UserError(
      f"{key}={config.path!r} is {found}; kind {config.kind!r} needs {what}"
    )
  return path
