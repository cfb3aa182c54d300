"""Which drawn pictures count as the same one.

Distance: root mean square difference of the pictures as 16x16 averages,
values in [0, 1]. It ignores where an edge falls within a pixel, which is how
two renderings of one drawing differ.
"""

import numpy as np
from jaxtyping import Float, UInt8

# "Full moon" and "yellow circle" are 0.002 apart, "green book" and "blue book"
# as lines 0.012, "man" and "man pouting" 0.013.
SAME = 0.0125
# A colour picture that shows no colour, and its lines (clocks 0.005, swan
# 0.014); "lizard", green, is far above.
SAME_LINES = 0.025
_BLOCK = 4
SIZE = 64


def thumb(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, " f"]:
  """The averages of 4x4 pixels, scaled so that distances are Euclidean."""
  height, width, channels = image.shape
  blocks = image.reshape(
    height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, channels
  )
  values = blocks.mean((1, 3), dtype=np.float32).ravel() / 255
  return values / np.float32(np.sqrt(values.size))


def same_lines(
  color: UInt8[np.ndarray, "H W 3"], line: UInt8[np.ndarray, "H W 3"]
) -> bool:
  """Whether an emoji's line drawing is its colour picture over again."""
  return bool(np.linalg.norm(thumb(color) - thumb(line)) < SAME_LINES)


class Seen:
  """Pictures of 64x64 so far, to tell a new one from a repetition."""

  def __init__(self):
    self._means = np.zeros(0)
    self._thumbs = np.zeros((0, (SIZE // _BLOCK) ** 2 * 3), np.float32)
    self._count = 0

  def add(self, image: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Adds a picture; returns False, adding nothing, if it was there."""
    new = thumb(image)
    mean = float(image.mean() / 255)
    # Means are never further apart than the pictures; few are left to compare.
    near = np.flatnonzero(np.abs(self._means[: self._count] - mean) < SAME)
    apart = self._thumbs[near] - new if near.size else np.ones((1, 1))
    if float(np.einsum("nf,nf->n", apart, apart).min()) < SAME**2:
      return False
    if self._count == len(self._thumbs):
      room = max(256, self._count)
      self._means = np.concatenate([self._means, np.zeros(room)])
      empty = np.zeros((room, new.size), np.float32)
      self._thumbs = np.concatenate([self._thumbs, empty])
    self._means[self._count] = mean
    self._thumbs[self._count] = new
    self._count += 1
    return True
