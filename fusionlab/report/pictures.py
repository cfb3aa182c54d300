"""Pictures as data URIs: looked at by Pillow, never passed on unread."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image

# Pixels a side that are kept; larger pictures are shown smaller anyway.
LARGEST = 128
_LARGEST_READ = 8192


def data_uri(folder: Path, name: object) -> str | None:
  """Encodes a picture file for an <img>, pixel for pixel.

  Pictures of more than 128 pixels a side are shrunk to that, with loss.

  Args:
    folder: what `name` is relative to; nothing outside of it is read.
    name: the file; None is no picture.

  Returns:
    'data:image/webp;base64,…'; '' where there is no such file or it is no
    picture that Pillow can read; None where `name` is.
  """
  if name is None:
    return None
  if not isinstance(name, str):
    return ""
  try:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
      return ""
    with warnings.catch_warnings(), Image.open(path) as opened:
      warnings.simplefilter("ignore")
      if max(opened.size) > _LARGEST_READ:
        return ""
      picture = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
  except Exception:  # Pillow's plugins raise kinds of their own
    return ""
  lossless = max(picture.size) <= LARGEST
  if not lossless:
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, "WEBP", lossless=lossless, quality=85, exact=True)
  return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(
    "ascii"
  )
