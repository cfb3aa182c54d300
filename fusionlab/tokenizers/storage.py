"""Tokenizer files: the packaged ones, whole reads and all-or-nothing writes."""

import hashlib
import importlib.resources
import os
import tempfile
from pathlib import Path

from fusionlab.errors import UserError

TEXT_FILE = "text.json"
IMAGE_FILE = "image.safetensors"
LATENT_FILE = "latents.safetensors"
NO_IMAGE_FILE = "image.none"


def packaged(name: str) -> Path:
  """Path of a tokenizer file that the package carries.

  Args:
    name: `TEXT_FILE`, `IMAGE_FILE` or `LATENT_FILE`.
  """
  return Path(str(importlib.resources.files("fusionlab.tokenizers"))) / (
    f"files/{name}"
  )


def read(path: str | Path, what: str) -> bytes:
  """Returns the whole content of a tokenizer file.

  Args:
    path: the file.
    what: its name in messages ("text tokenizer").

  Raises:
    UserError: no such file, a folder, or no permission to read it.
  """
  try:
    return Path(path).read_bytes()
  except FileNotFoundError:
    raise UserError(
      f"{what}: there is no file {str(path)!r}; leave the path empty for the"
      f" packaged one, or make one with python -m fusionlab.tokenizers"
    ) from None
  except OSError as error:
    raise UserError(
      f"{what}: cannot read {str(path)!r} ({error.strerror}); give the path of"
      f" a readable file"
    ) from None


def prepare_folder(folder: str | Path) -> Path:
  """Makes a folder before long work whose result shall go there.

  Raises:
    UserError: it cannot be made or written.
  """
  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      return Path(folder)
  except OSError as error:
    raise UserError(
      f"cannot write into {str(folder)!r} ({error.strerror}); nothing was"
      f" written; choose a folder you may write to"
    ) from None


def write(path: str | Path, content: bytes) -> None:
  """Writes a file whole or not at all: a temporary name, then a rename.

  Args:
    path: the file to make; its folder is made where it is missing.
    content: what it shall hold.

  Raises:
    UserError: the folder cannot be made or written.
  """
  path = Path(path)
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
      dir=path.parent, prefix=f".{path.name}."
    )
    with os.fdopen(handle, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp makes files that only their owner may read; a tokenizer is shared.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(
      f"cannot write {str(path)!r} ({error.strerror}); nothing was written;"
      f" choose a folder you may write to"
    ) from None
  finally:
    if temporary is not None and os.path.exists(temporary):
      os.unlink(temporary)


def sha256(content: bytes) -> str:
  """Returns the SHA-256 of a file's content, 64 hex digits."""
  return hashlib.sha256(content).hexdigest()
