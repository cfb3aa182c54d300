"""A folder of pictures, each beside a text file of the same name."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part
from fusionlab.data.sources.files import (
  content_split,
  decode,
  existing,
  file_facts,
  read_bytes,
)
from fusionlab.data.sources.packaged import digest
from fusionlab.data.sources.pictures import ENDINGS, read_picture
from fusionlab.errors import UserError


class ImageFolder:
  """Kind `image_folder`: `a/cat.png` with `a/cat.txt`, at any depth.

  Each line of the text file is one caption; the first is the default. The
  fraction `heldout` of the pictures is held out by their content.
  """

  def __init__(self, config: SourceConfig, name: str):
    """Looks for the folder.

    Raises:
      UserError: it is missing, or no folder.
    """
    self._config = config
    self._name = name
    self._root = existing(config, name, folder=True)

  def fingerprint(self) -> str:
    """Hash of the files' names, sizes and times, and of `heldout`."""
    files = [file for pair in self._pairs for file in pair]
    return digest(
      {
        "kind": "image_folder",
        "heldout": self._config.heldout,
        "files": file_facts(files, self._root),
      }
    )

  def __len__(self) -> int:
    return len(self._pairs)

  def examples(self) -> Iterator[Example]:
    """Yields (captions, picture) with the picture's name as key.

    Raises:
      UserError: a broken picture, a caption that is not UTF-8 or empty.
    """
    for image, text in self._pairs:
      data = self._read(image)
      picture = read_picture(data, self._where(image))
      lines = decode(self._read(text), self._where(text)).splitlines()
      captions = dict.fromkeys(x.strip() for x in lines if x.strip())
      yield Example(
        key=os.fsencode(image.relative_to(self._root)).decode(errors="replace"),
        split=content_split(data, self._config.heldout),
        parts=(Part("text", tuple(captions)), Part("image", (picture,))),
      )

  @functools.cached_property
  def _pairs(self) -> tuple[tuple[Path, Path], ...]:
    files = sorted(f for f in self._root.rglob("*") if f.is_file())
    there = set(files)
    pairs = []
    for image in files:
      if image.suffix.lower() in ENDINGS:
        text = image.with_suffix(".txt")
        if text not in there:
          raise UserError(
            f"{self._where(image)} has no caption; write {text.name} beside it"
            f" or remove the picture"
          )
        pairs.append((image, text))
    if not pairs:
      raise UserError(
        f"source {self._name!r}: {self._root} has no pictures"
        f" ({' '.join(e[1:] for e in ENDINGS)}); put pictures there, each with"
        f" a .txt of the same name"
      )
    return tuple(pairs)

  def _read(self, file: Path) -> bytes:
    return read_bytes(file, f"source {self._name!r}", "replace or remove it")

  def _where(self, file: Path) -> str:
    return f"source {self._name!r}: {file}"
