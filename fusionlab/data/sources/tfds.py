"""A TFDS dataset that is already prepared as array_record or parquet.

Reading needs no TensorFlow, and the dataset's own code is not imported: its
folder says all there is to know. Preparing one needs TensorFlow, somewhere.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part
from fusionlab.data.sources.files import content_split, decode, file_facts
from fusionlab.data.sources.packaged import digest
from fusionlab.data.sources.pictures import as_rgb
from fusionlab.errors import UserError, nearest

FORMATS = ("array_record", "parquet")
_INFO = "dataset_info.json"


class Tfds:
  """Kind `tfds`: `path` is a prepared folder or NAME[/CONFIG][:VERSION].

  A name is looked up in $TFDS_DATA_DIR or ~/tensorflow_datasets; the newest
  version is taken where none is given. `image_field` and `text_field` name
  features, with dots for nested ones ("captions.text"); an empty `image_field`
  gives texts alone. `split` is trained on; `heldout_split` is held out, or,
  where it is empty, the fraction `heldout` of `split` by content.
  """

  def __init__(self, config: SourceConfig, name: str):
    """Finds the dataset and checks its format, fields and splits.

    Raises:
      UserError: it is not there or not in a format that reads without
        TensorFlow (with the command that prepares it), or lacks a field or
        a split.
    """
    self._config = config
    self._name = name
    self._folder = self._find()
    info = self._info()
    if info.get("fileFormat", "tfrecord") not in FORMATS:
      raise self._unprepared(
        f"is prepared as {info.get('fileFormat', 'tfrecord')}, which only"
        f" TensorFlow reads"
      )
    self._text = self._feature("text_field", config.text_field)
    if config.image_field:
      self._feature("image_field", config.image_field)
    len(self)  # The splits are there and share no record.

  def fingerprint(self) -> str:
    """Hash of the dataset's files (sizes and times) and the options."""
    config = self._config
    files = [f for f in self._folder.iterdir() if f.is_file()]
    return digest(
      {
        "kind": "tfds",
        "heldout": config.heldout,
        "fields": [config.image_field, config.text_field],
        "splits": [config.split, config.heldout_split],
        "files": file_facts(files, self._folder),
      }
    )

  def __len__(self) -> int:
    return sum(len(r) for _, ranges in self._splits for _, r in ranges)

  def examples(self) -> Iterator[Example]:
    """Yields examples with keys such as "train/17", in stored order.

    Raises:
      UserError: a record without text, or with something else than text or a
        picture in its fields.
    """
    config = self._config
    for side, ranges in self._splits:
      for split, numbers in ranges:
        rows = self._rows(split)
        for number in numbers:
          row = rows[number]
          where = f"source {self._name!r}: {self._folder} {split} #{number}"
          texts = self._texts(_pick(row, config.text_field), where)
          parts = [Part("text", texts)]
          content = texts[0].encode()
          if config.image_field:
            value = _pick(row, config.image_field)
            image = as_rgb(value, f"{where}: field {config.image_field!r}")
            parts.append(Part("image", (image,)))
            content = image.tobytes()
          yield Example(
            key=f"{split}/{number}",
            split=side or content_split(content, config.heldout),
            parts=tuple(parts),
          )

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(os.fspath(self._folder))

  def _rows(self, split: str) -> Any:
    """The split's records, by number."""
    try:
      return self._builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises of many kinds.
      raise UserError(
        f"source {self._name!r}: cannot read split {split!r} of"
        f" {self._folder} ({' '.join(str(error).split())[:160]})"
      ) from error

  def _find(self) -> Path:
    path = self._config.path
    if not path:
      raise UserError(
        f"config.data.sources.{self._name}.path is empty; kind 'tfds' needs a"
        f" prepared folder or a name, e.g. coco_captions"
      )
    folder = Path(path).expanduser()
    if (folder / _INFO).is_file():
      return folder
    root = Path(
      os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()
    name, _, version = path.partition(":")
    base = folder if folder.is_dir() else root / name
    if version and (base / version / _INFO).is_file():
      return base / version
    found = [
      d
      for d in (base.iterdir() if base.is_dir() else ())
      if re.fullmatch(r"\d+\.\d+\.\d+", d.name) and (d / _INFO).is_file()
    ]
    if found and not version:
      return max(found, key=lambda d: [int(n) for n in d.name.split(".")])
    raise self._unprepared(f"is not prepared in {base}")

  def _info(self) -> dict[str, Any]:
    file = self._folder / _INFO
    try:
      return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise self._unprepared(f"has an unreadable {file}") from error

  def _unprepared(self, what: str) -> UserError:
    path = self._config.path
    name = path
    if os.sep in os.fspath(Path(path)) and Path(path).is_absolute():
      name = "NAME"
    return UserError(
      f"source {self._name!r}: TFDS dataset {path!r} {what}; where TensorFlow"
      f" is: tfds build {name} --file_format=array_record (then copy the"
      f" folder, or set TFDS_DATA_DIR)"
    )

  @functools.cached_property
  def _splits(self) -> list[tuple[str, list[tuple[str, range]]]]:
    """(our split, or "" where content decides; the records it is made of)."""
    config = self._config
    train = self._ranges("split", config.split)
    if not config.heldout_split:
      return [("", train)]
    heldout = self._ranges("heldout_split", config.heldout_split)
    for split, numbers in train:
      for other, others in heldout:
        if split == other and set(numbers) & set(others):
          raise UserError(
            f"config.data.sources.{self._name}.heldout_split="
            f"{config.heldout_split!r} shares records with"
            f" split={config.split!r}; name another, or '' for a fraction"
          )
    return [("train", train), ("heldout", heldout)]

  def _ranges(self, key: str, text: str) -> list[tuple[str, range]]:
    """Records of "train", "train[:90%]" or "train+test".

    Slices are cut here: TFDS 4.9.10 reads a parquet split whole, whatever
    slice is asked for.
    """
    import tensorflow_datasets as tfds

    splits = dict(self._builder.info.splits)
    where = f"config.data.sources.{self._name}.{key}={text!r}: {self._folder}"
    for base in re.findall(r"(?:^|\+)\s*([^\[+]*)", text):
      if base.strip() not in (*splits, "all"):
        raise UserError(f"{where} has no such split{nearest(base, splits)}")
    try:
      spec = tfds.core.ReadInstruction.from_spec(text)
      parts = spec.to_absolute(splits)
    except (ValueError, AssertionError) as error:
      raise UserError(
        f"{where}: not a slice ({' '.join(str(error).split())[:120]}); write"
        f" e.g. train[:90%]"
      ) from error
    ranges = [
      (p.splitname, range(splits[p.splitname].num_examples)[p.from_ : p.to])
      for p in parts
    ]
    if not any(len(numbers) for _, numbers in ranges):
      raise UserError(f"{where} has no records there; choose another slice")
    return ranges

  def _feature(self, key: str, field: str) -> Any:
    feature: Any = self._builder.info.features
    for step in field.split("."):
      inner = getattr(feature, "feature", feature)  # Of a Sequence, its item.
      names = list(inner.keys()) if hasattr(inner, "keys") else []
      if step not in names:
        raise UserError(
          f"config.data.sources.{self._name}.{key}={field!r}: {self._folder}"
          f" has no such field{nearest(step, names)}"
        )
      feature = inner[step]
    return feature

  def _texts(self, value: Any, where: str) -> tuple[str, ...]:
    """Captions of one record; a class label's caption is its name."""
    field = f"{where}: field {self._config.text_field!r}"
    if hasattr(self._text, "int2str"):
      value = self._text.int2str(int(value)).replace("_", " ")
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    texts = []
    for text in values:
      if isinstance(text, str):
        text = text.encode()
      if not isinstance(text, bytes):
        raise UserError(
          f"{field} holds {type(text).__name__}, not text; name another field"
          f" by config.data.sources.{self._name}.text_field"
        )
      texts.append(decode(text, field))
    if not texts:
      raise UserError(f"{field} is empty; choose a split in which it is not")
    return tuple(dict.fromkeys(texts))


def _pick(row: Any, field: str) -> Any:
  """The value at a dotted name; a list of records gives a list of values."""
  for step in field.split("."):
    if isinstance(row, (list, tuple)):
      row = [item[step] for item in row]
    else:
      row = row[step]
  return row
