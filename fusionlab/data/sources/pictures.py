"""Pictures from files: read to RGB, and made square."""

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from fusionlab.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def read_picture(data: bytes, where: str) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes a picture to RGB at its own size.

  Transparent parts become white, the camera's orientation is applied, of an
  animation the first frame is taken.

  Args:
    data: the file's bytes.
    where: what names the file in a message.

  Raises:
    UserError: the bytes are no picture, or a broken or an enormous one.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      picture = Image.open(io.BytesIO(data))
      picture.load()
      picture = ImageOps.exif_transpose(picture)
      return _rgb(picture)
  except UnidentifiedImageError:
    raise UserError(
      f"{where} is not a picture that Pillow can read; replace or remove it"
    ) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise UserError(
      f"{where} is larger than {Image.MAX_IMAGE_PIXELS} pixels; shrink or"
      f" remove it"
    ) from None
  except Exception as error:  # Pillow's plugins raise kinds of their own
    raise UserError(
      f"{where} is a broken picture ({_one_line(error)}); replace or remove it"
    ) from error


def as_rgb(value: object, where: str) -> UInt8[np.ndarray, "H W 3"]:
  """Checks an array of pixels and makes it RGB.

  Args:
    value: uint8 [H, W, C] with 1, 3 or 4 channels, or [H, W].
    where: what names it in a message.

  Raises:
    UserError: it is not such an array.
  """
  array = np.asarray(value)
  if array.ndim == 2:
    array = array[..., None]
  if (
    array.dtype != np.uint8
    or array.ndim != 3
    or array.shape[-1] not in (1, 3, 4)
    or not array.size
  ):
    raise UserError(
      f"{where} is {array.dtype} {list(array.shape)}; a picture is uint8"
      f" [height, width, 1, 3 or 4 channels]"
    )
  if array.shape[-1] == 4:
    return _rgb(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
  return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def square(
  image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """The middle square of a picture, resized.

  Args:
    image: RGB.
    size: side in pixels.

  Returns:
    `image` itself where it has that size already.
  """
  height, width, _ = image.shape
  if height == width == size:
    return image
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  middle = Image.fromarray(image[top : top + side, left : left + side])
  return np.asarray(middle.resize((size, size), Image.Resampling.LANCZOS))


def _rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
    # 16-bit grey: Pillow would cut it off at 255.
    wide = np.clip(np.asarray(picture), 0, 65535)
    picture = Image.fromarray((wide // 257).astype(np.uint8))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  return np.array(picture.convert("RGB"))


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
