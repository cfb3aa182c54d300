"""Reading pictures to RGB, and making them square."""

import io

import numpy as np
import pytest
from PIL import Image

from fusionlab.data.sources.pictures import as_rgb, read_picture, square
from fusionlab.errors import UserError


def encoded(picture, kind="PNG", **options) -> bytes:
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("picture", "color"),
  [
    (Image.new("L", (3, 2), 7), [7, 7, 7]),
    (Image.new("1", (3, 2), 1), [255, 255, 255]),
    (Image.new("RGBA", (3, 2), (9, 9, 9, 0)), [255, 255, 255]),
    (Image.new("RGBA", (3, 2), (1, 2, 3, 255)), [1, 2, 3]),
    (Image.new("LA", (3, 2), (9, 0)), [255, 255, 255]),
    (Image.new("RGB", (3, 2), (1, 2, 3)).quantize(), [1, 2, 3]),
    (Image.fromarray(np.full((2, 3), 257 * 80, np.uint16)), [80, 80, 80]),
  ],
)
def test_every_mode_becomes_rgb_on_white(picture, color):
  array = read_picture(encoded(picture), "x")
  assert array.shape == (2, 3, 3) and array.dtype == np.uint8
  assert (array == color).all()


@pytest.mark.smoke
def test_the_cameras_orientation_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # Turned by 90 degrees.
  data = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
  assert read_picture(data, "x").shape == (30, 20, 3)


@pytest.mark.smoke
def test_an_enormous_picture_is_refused(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  for side in (11, 40):
    with pytest.raises(UserError, match="x is larger than 100 pixels; shrink"):
      read_picture(encoded(Image.new("L", (side, side))), "x")


@pytest.mark.smoke
def test_square_takes_the_middle():
  image = np.zeros((4, 10, 3), np.uint8)
  image[:, 3:7] = 200
  assert (square(image, 2) == 200).all() and square(image, 2).shape == (2, 2, 3)
  assert (square(image.transpose(1, 0, 2).copy(), 4) == 200).all()
  assert square(image, 9).shape == (9, 9, 3)
  whole = np.zeros((4, 4, 3), np.uint8)
  assert square(whole, 4) is whole


@pytest.mark.smoke
def test_arrays_of_pixels():
  grey = np.full((2, 3, 1), 5, np.uint8)
  assert as_rgb(grey, "x").tolist() == np.full((2, 3, 3), 5).tolist()
  assert as_rgb(grey[..., 0], "x").shape == (2, 3, 3)
  assert (as_rgb(np.zeros((2, 3, 4), np.uint8), "x") == 255).all()
  for bad in (grey.astype(np.float32), np.zeros((2, 3, 2), np.uint8), "text"):
    with pytest.raises(UserError, match=r"x is .*; a picture is uint8"):
      as_rgb(bad, "x")
