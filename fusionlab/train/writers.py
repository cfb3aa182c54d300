"""Where metrics go: one small interface, CSV, JSON lines and TensorBoard."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from fusionlab.errors import UserError
from fusionlab.registry import Registry

WRITERS = Registry(
  "writer",
  {
    "csv": "fusionlab.train.writers:CsvWriter",
    "jsonl": "fusionlab.train.writers:JsonlWriter",
    "tensorboard": "fusionlab.train.writers:TensorBoardWriter",
  },
)


class Writer(Protocol):
  """Receives rows of metrics; made with the workdir by process 0."""

  def __init__(self, workdir: Path): ...

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Records metrics of a step, on disk before it returns."""

  def truncate(self, step: int) -> None:
    """Cuts what was recorded after `step`; called once, on resume."""

  def close(self) -> None:
    """Releases files."""


class CsvWriter:
  """`<workdir>/metrics.csv`: first column `step`, one row per logged step.

  Cells of metrics that a row lacks are empty. A second row of the last step is
  merged into it. A new metric extends the header by an atomic rewrite.
  """

  def __init__(self, workdir: Path):
    """Opens or continues the file.

    Raises:
      UserError: a metrics.csv that does not begin with a column `step`.
    """
    self.path = Path(workdir) / "metrics.csv"
    self._columns = ["step"]
    self._last: dict[str, str] = {}
    self._offset = 0
    rows = self._read()
    self._rewrite(rows)

  def write(self, step: int, row: Mapping[str, float]) -> None:
    cells = {name: _number(value) for name, value in row.items()}
    merge = self._last.get("step") == str(step)
    cells = {**(self._last if merge else {}), **cells, "step": str(step)}
    new = [name for name in cells if name not in self._columns]
    if new:
      self._columns += new
      rows = self._read(keep_columns=True)
      self._rewrite([*(rows[:-1] if merge else rows), cells])
      return
    line = _lines([[cells.get(c, "") for c in self._columns]])
    # One write call: a kill leaves either the old file or the new line.
    with open(self.path, "r+b") as file:
      end = file.seek(0, os.SEEK_END)
      start = self._offset if merge else end
      os.pwrite(file.fileno(), line, start)
      if merge:
        file.truncate(start + len(line))
    self._offset, self._last = start, cells

  def truncate(self, step: int) -> None:
    self._rewrite([row for row in self._read() if int(row["step"]) <= step])

  def last(self) -> dict[str, str]:
    """Returns the non-empty cells of the last row."""
    return {name: cell for name, cell in self._last.items() if cell}

  def close(self) -> None:
    """Holds no open file."""

  def _read(self, keep_columns: bool = False) -> list[dict[str, str]]:
    if not self.path.exists():
      return []
    # What is not UTF-8 is no row of ours; it goes the way of torn lines.
    with open(
      self.path, newline="", encoding="utf-8", errors="replace"
    ) as file:
      table = list(csv.reader(file))
    if not table:
      return []
    header = table[0]
    if not header or header[0] != "step":
      raise UserError(
        f"{self.path} does not begin with a column 'step', so it is not ours;"
        f" move it away or choose another --workdir"
      )
    if not keep_columns:
      self._columns = header
    # A line cut by a crash of the machine has too few cells or no number.
    return [
      dict(zip(header, cells, strict=True))
      for cells in table[1:]
      if len(cells) == len(header) and cells[0].isdigit()
    ]

  def _rewrite(self, rows: list[dict[str, str]]) -> None:
    body = [[row.get(c, "") for c in self._columns] for row in rows]
    head = _lines([self._columns, *body[:-1]])
    last = _lines(body[-1:])
    write_atomic(self.path, head + last)
    self._offset = len(head)
    self._last = rows[-1] if rows else {}


class JsonlWriter:
  """`<workdir>/metrics.jsonl`: one object a row; what is not finite is null."""

  def __init__(self, workdir: Path):
    """Opens or continues the file."""
    self.path = Path(workdir) / "metrics.jsonl"

  def write(self, step: int, row: Mapping[str, float]) -> None:
    finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
    line = json.dumps({"step": step, **finite}) + "\n"
    with open(self.path, "ab") as file:
      file.write(line.encode())

  def truncate(self, step: int) -> None:
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_bytes().splitlines(keepends=True):
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line)
      except (ValueError, KeyError, TypeError):
        continue  # torn by a crash of the machine
    write_atomic(self.path, b"".join(kept))

  def close(self) -> None:
    """Holds no open file."""


class TensorBoardWriter:
  """`<workdir>/tensorboard/`: event files, by tensorboardX."""

  def __init__(self, workdir: Path):
    """Prepares the folder; the event file is opened by the first row."""
    self.path = Path(workdir) / "tensorboard"
    self._purge: int | None = None
    self._writer = None

  def write(self, step: int, row: Mapping[str, float]) -> None:
    if self._writer is None:
      try:
        from tensorboardX import SummaryWriter
      except ImportError as error:
        raise UserError(
          f"the writer 'tensorboard' needs tensorboardX ({error}); pip install"
          f" tensorboardX, or set config.train.writers='csv jsonl'"
        ) from error
      # TensorBoard itself drops what other files have from purge_step on.
      self._writer = SummaryWriter(str(self.path), purge_step=self._purge)
    for name, value in row.items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def truncate(self, step: int) -> None:
    self._purge = step + 1

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


class Writers:
  """Several writers as one."""

  def __init__(self, names: str, workdir: Path):
    """Opens each.

    Args:
      names: `config.train.writers`.
      workdir: the run's folder.

    Raises:
      UserError: an unknown name, with the nearest.
    """
    self.all: list[Writer] = [
      WRITERS.load(name)(workdir) for name in names.split()
    ]

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Records a row everywhere; an empty one nowhere."""
    if row:
      for writer in self.all:
        writer.write(step, row)

  def truncate(self, step: int) -> None:
    """Cuts what was recorded after `step`, everywhere."""
    for writer in self.all:
      writer.truncate(step)

  def has_evaluation(self, step: int) -> bool:
    """True where metrics.csv ends with an evaluated row of `step`."""
    for writer in self.all:
      if isinstance(writer, CsvWriter):
        last = writer.last()
        return last.get("step") == str(step) and any(
          name.startswith("eval/") for name in last
        )
    return False

  def close(self) -> None:
    """Closes all."""
    for writer in self.all:
      writer.close()


def write_atomic(path: Path, content: bytes | str) -> None:
  """Replaces a file in one step, so that a kill leaves the old or the new.

  Args:
    path: the file; its folder exists.
    content: text is written as UTF-8.
  """
  if isinstance(content, str):
    content = content.encode()
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
  """Makes a folder that is whole or not there.

  Args:
    folder: new or empty.

  Yields:
    A hidden folder beside it, which takes its name when the block ends.

  Raises:
    UserError: it cannot be written.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
      tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
    )
  except OSError as error:
    raise UserError(f"cannot write {folder}: {error.strerror}") from error
  try:
    yield partial
    partial.chmod(0o755)
    os.replace(partial, folder)
  except OSError as error:
    raise UserError(f"cannot write {folder}: {error}") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _number(value: float) -> str:
  """The shortest text that reads back as the same number."""
  value = float(value)
  return (
    repr(int(value))
    if value.is_integer() and abs(value) < 2**53
    else (repr(value))
  )


def _lines(rows: list[list[str]]) -> bytes:
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  return text.getvalue().encode()
