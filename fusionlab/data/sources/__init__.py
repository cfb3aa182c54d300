"""Where examples come from: one small class per kind, found by name.

A source yields examples in a fixed order, each with its key and its split. It
knows nothing of tokens: `fusionlab.data.preparation` turns its examples into
ids once. A source of your own is any class with the methods of `Source`, named
`package.module:Class` in `config.data.sources.<name>.kind`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from fusionlab.data.config import SourceConfig
from fusionlab.errors import UserError
from fusionlab.registry import Registry


@dataclasses.dataclass(frozen=True)
class Part:
  """One piece of an example, of one modality.

  Attributes:
    modality: "text" or "image" (a name of the vocabulary).
    alternatives: text: one or more captions that say the same, the first is
      the default one (English where there is one); image: ONE array, uint8
      [H, W, 3], RGB.
  """

  modality: str
  alternatives: tuple[str, ...] | tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Example:
  """What a source yields.

  Attributes:
    key: unique within the source and the same on every machine.
    split: "train", or the name of a held-out split.
    parts: a text alone, or a text and its picture, in that order.
  """

  key: str
  split: str
  parts: tuple[Part, ...]


@runtime_checkable
class Source(Protocol):
  """What a kind of source must offer."""

  def __init__(self, config: SourceConfig, name: str): ...

  def fingerprint(self) -> str:
    """Hash of everything that determines the examples (hex)."""
    ...

  def examples(self) -> Iterator[Example]:
    """Yields the examples, in the same order each time."""
    ...

  def __len__(self) -> int:
    """Number of examples in all splits."""
    ...


SOURCES = Registry(
  "source",
  {
    "openmoji": "fusionlab.data.sources.openmoji:OpenMoji",
    "flags": "fusionlab.data.sources.flags:Flags",
    "factbook": "fusionlab.data.sources.factbook:Factbook",
    "image_folder": "fusionlab.data.sources.image_folder:ImageFolder",
    "jsonl": "fusionlab.data.sources.jsonl:JsonLines",
    "tfds": "fusionlab.data.sources.tfds:Tfds",
  },
)


def load_source(name: str, config: SourceConfig) -> Source:
  """Makes the source of `config.data.sources.<name>`.

  Args:
    name: its name in the config, used in messages.
    config: its settings; `kind` is a name of `SOURCES` or
      `package.module:Class`.

  Returns:
    The source; nothing large is read before `examples()` is called.

  Raises:
    UserError: an unknown kind (with the nearest name), a missing package, or
      a path the kind cannot read.
  """
  kind = SOURCES.load(config.kind)
  if not isinstance(kind, type) or not issubclass(kind, Source):
    raise UserError(
      f"config.data.sources.{name}.kind={config.kind!r} is no source: it must be"
      f" a class with fingerprint(), examples() and __len__()"
    )
  return kind(config, name)
