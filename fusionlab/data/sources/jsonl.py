"""Lines of JSON: texts, and pictures with captions."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from fusionlab.data.sources.pictures import read_picture
from fusionlab.errors import UserError, nearest


class JsonLines:
  """Kind `jsonl`: `{"text": …}` or `{"image": "a.png", "caption": …}`.

  The caption's key is `text_field`, "caption" or "text", the first that the
  line has; its value is a string or a list of strings. The picture's key is
  `image_field`; its path is relative to the file. Other keys are left alone.
  The fraction `heldout` is held out by the picture's (or text's) content.
  """

  def __init__(self, config: SourceConfig, name: str):
    """Looks for the file.

    Raises:
      UserError: it is missing, or a folder.
    """
    self._config = config
    self._name = name
    self._file = existing(config, name, folder=False)

  def fingerprint(self) -> str:
    """Hash of the file and of the pictures it names: sizes and times."""
    files = {self._file}
    for number, row in self._rows:
      if self._image_field in row:
        files.add(self._picture(number, row))
    config = self._config
    return digest(
      {
        "kind": "jsonl",
        "heldout": config.heldout,
        "fields": [config.image_field, config.text_field],
        "files": file_facts(files, self._file.parent),
      }
    )

  def __len__(self) -> int:
    return len(self._rows)

  def examples(self) -> Iterator[Example]:
    """Yields examples with the line number as key, from 1.

    Raises:
      UserError: a line that is not UTF-8, not JSON or lacks its fields; a
        broken picture. Each names the file and the line.
    """
    for number, row in self._rows:
      texts = self._texts(number, row)
      parts = [Part("text", texts)]
      content = texts[0].encode()
      if self._image_field in row:
        file = self._picture(number, row)
        content = read_bytes(file, self._where(number), "correct the path")
        picture = read_picture(content, f"{self._where(number)}: {file}")
        parts.append(Part("image", (picture,)))
      split = content_split(content, self._config.heldout)
      yield Example(str(number), split, tuple(parts))

  @property
  def _image_field(self) -> str:
    return self._config.image_field

  @functools.cached_property
  def _rows(self) -> tuple[tuple[int, dict[str, Any]], ...]:
    data = read_bytes(self._file, f"source {self._name!r}", "correct the path")
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
      if line.strip():
        rows.append((number, self._row(number, line)))
    if not rows:
      raise UserError(
        f"source {self._name!r}: {self._file} is empty; write one JSON object"
        f' a line, e.g. {{"text": "…"}}'
      )
    return tuple(rows)

  def _row(self, number: int, line: bytes) -> dict[str, Any]:
    try:
      row = json.loads(decode(line, self._where(number)))
    except (ValueError, RecursionError) as error:
      reason = "nested too deeply"
      if isinstance(error, ValueError):
        reason = str(error)
      if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
      raise UserError(
        f"{self._where(number)} is not JSON ({reason}); write one object a"
        f' line, e.g. {{"text": "…"}}'
      ) from None
    if not isinstance(row, dict):
      raise UserError(
        f"{self._where(number)} is a JSON {type(row).__name__}, not an object;"
        f' write e.g. {{"text": "…"}}'
      )
    return row

  def _texts(self, number: int, row: dict[str, Any]) -> tuple[str, ...]:
    allowed = dict.fromkeys((self._config.text_field, "caption", "text"))
    field = next((f for f in allowed if f in row), None)
    if field is None:
      given = next(iter(row), "")
      missing = " or ".join(repr(f) for f in allowed)
      raise UserError(
        f"{self._where(number)} has no field {missing}{nearest(given, row)};"
        f" name the field that holds the text by"
        f" config.data.sources.{self._name}.text_field"
      )
    value = row[field]
    texts = value if isinstance(value, list) else [value]
    kept = [t.strip() for t in texts if isinstance(t, str) and t.strip()]
    if not kept or len(kept) < len(texts):
      raise UserError(
        f"{self._where(number)}: {field!r} must be text or a list of texts,"
        f" none empty, not {json.dumps(value)[:60]}; correct or remove it"
      )
    if any("\ud800" <= c <= "\udfff" for text in kept for c in text):
      raise UserError(
        f"{self._where(number)}: {field!r} has half a surrogate pair, which is"
        f" no text; correct the escape \\ud8xx"
      )
    return tuple(dict.fromkeys(kept))

  def _picture(self, number: int, row: dict[str, Any]) -> Path:
    value = row[self._image_field]
    if not isinstance(value, str) or not value:
      raise UserError(
        f"{self._where(number)}: {self._image_field!r} must be the path of a"
        f" picture, not {json.dumps(value)[:60]}"
      )
    file = self._file.parent / value
    if not file.is_file():
      raise UserError(
        f"{self._where(number)}: there is no picture {file}; the path is"
        f" relative to {self._file.parent}"
      )
    return file

  def _where(self, number: int) -> str:
    return f"source {self._name!r}: {self._file} line {number}"
