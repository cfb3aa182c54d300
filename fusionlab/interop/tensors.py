"""Safetensors files: lazy reading as float32, and writing in pieces.

Only this format is read: a file of it is a table of numbers and runs nothing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fusionlab.errors import UserError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_READ = ("F32", "BF16", "F16")
DTYPES: Mapping[str, Any] = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Tensors(Mapping[str, np.ndarray]):
  """Tensors of some files by name, each read when it is asked for."""

  def __init__(self, files: Iterable[Path]):
    """Opens files and reads their headers.

    Args:
      files: safetensors files.

    Raises:
      UserError: a file that cannot be opened, is truncated or malformed, a name
        that two files have, or a dtype other than F32, BF16 and F16.
    """
    self._files: dict[str, tuple[Path, Any]] = {}
    for path in files:
      try:
        opened = safe_open(path, framework="np")
      except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
      for name in opened.keys():  # noqa: SIM118 (no mapping)
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in _READ:
          raise UserError(
            f"{path}: tensor {name!r} is {dtype}; weights must be"
            f" {', '.join(_READ)}"
          )
        if name in self._files:
          raise UserError(
            f"{path}: tensor {name!r} is also in {self._files[name][0]}"
          )
        self._files[name] = path, opened

  def __getitem__(self, name: str) -> np.ndarray:
    path, opened = self._files[name]
    try:
      return np.asarray(opened.get_tensor(name), np.float32)
    except (OSError, SafetensorError, TypeError) as error:
      raise UserError(
        f"{path}: tensor {name!r} cannot be read ({_said(error)})"
      ) from error

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def without(self, names: Iterable[str]) -> None:
    """Leaves tensors out.

    Args:
      names: of some that are here.
    """
    for name in names:
      del self._files[name]

  def file_of(self, name: str) -> str:
    """Path of the file that holds a tensor."""
    return str(self._files[name][0])


def open_folder(folder: Path) -> Tensors:
  """Opens `model.safetensors`, or the files that the index names.

  Raises:
    UserError: neither is there, an index that is no index, a shard that is
      missing or that holds something else than the index says.
  """
  if (folder / ONE_FILE).exists():
    return Tensors([folder / ONE_FILE])
  index = folder / INDEX
  if not index.exists():
    pickles = sorted(
      p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")
    )
    also = (
      f"; {pickles[0]} may run code when it is read and never is, convert it to"
      f" safetensors"
      if pickles
      else ""
    )
    raise UserError(f"{folder} has neither {ONE_FILE} nor {INDEX}{also}")
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not all(
    isinstance(file, str) and Path(file).name == file for file in where.values()
  ):
    raise UserError(
      f"{index}: weight_map must name a file of this folder for each tensor"
    )
  tensors = Tensors([folder / file for file in sorted(set(where.values()))])
  for name, file in where.items():
    if name not in tensors:
      raise UserError(f"{folder / file}: tensor {name!r} of {INDEX} is missing")
  for name in tensors:
    if where.get(name) != Path(tensors.file_of(name)).name:
      raise UserError(
        f"{tensors.file_of(name)}: tensor {name!r} is not here by {INDEX}"
      )
  return tensors


def write(
  folder: Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  dtype: str,
  shard_bytes: int = 4 * 2**30,
) -> int:
  """Writes tensors in the order given, in one file or several with an index.

  Args:
    folder: an existing folder.
    tensors: names and float32 arrays; held in memory one file at a time.
    dtype: of `DTYPES`; bfloat16 rounds to nearest even.
    shard_bytes: bytes of a file, at least one tensor each.

  Returns:
    Bytes of all tensors.
  """
  files: list[dict[str, Any]] = []
  batch: dict[str, np.ndarray] = {}
  total = 0

  def flush() -> None:
    path = folder / f"{len(files)}.part"
    # The metadata is what Hugging Face's loaders ask for.
    save_file(batch, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it is written for its owner alone
    files.append({"path": path, "names": list(batch)})
    batch.clear()

  for name, array in tensors:
    array = np.ascontiguousarray(array.astype(DTYPES[dtype]))
    held = sum(a.nbytes for a in batch.values())
    if batch and held + array.nbytes > shard_bytes:
      flush()
    batch[name] = array
    total += array.nbytes
  flush()
  if len(files) == 1:
    files[0]["path"].rename(folder / ONE_FILE)
    return total
  weight_map = {}
  for i, file in enumerate(files):
    name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
    file["path"].rename(folder / name)
    weight_map |= dict.fromkeys(file["names"], name)
  content = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
  return total


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    UserError: no such file, or something else in it.
  """
  try:
    content = json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  except ValueError as error:
    raise UserError(f"{path} is no JSON ({_said(error)})") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} holds no JSON object")
  return content


def _unreadable(path: Path, error: Exception) -> UserError:
  if isinstance(error, FileNotFoundError):
    return UserError(f"{path} is missing")
  return UserError(
    f"{path} is no whole safetensors file ({_said(error)}); get it again"
  )


def _said(error: Exception) -> str:
  return " ".join(str(error).split())[:160]
