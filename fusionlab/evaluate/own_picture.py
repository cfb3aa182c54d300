"""Does a generated picture look like the one its caption belongs to?

Every sample is compared with all pictures of a bank, and the rank of the picture
that the caption names is reported: a picture that is drawn well but is another one
does not pass. Pictures are decoded from codes or latents on both sides, so the
tokenizer's own loss does not count.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

_SIDE = 16


def features(
  pictures: UInt8[np.ndarray, "N S S 3"],
) -> Float[np.ndarray, "N F"]:
  """Pixels averaged over a grid of 16 x 16 boxes, float32.

  Args:
    pictures: S is a multiple of 16, or less than 16 (then nothing is averaged).
  """
  count, size = pictures.shape[:2]
  box = max(size // _SIDE, 1)
  whole = size // box * box
  boxes = pictures[:, :whole, :whole].reshape(
    count, whole // box, box, whole // box, box, 3
  )
  return boxes.mean(axis=(2, 4), dtype=np.float32).reshape(count, -1)


def ranks(
  samples: UInt8[np.ndarray, "n S S 3"],
  own: Int[np.ndarray, " n"],
  bank: UInt8[np.ndarray, "N S S 3"],
) -> Int[np.ndarray, " n"]:
  """Rank of each sample's own picture in the bank, from 1.

  By squared distance of `features`; pictures at the same distance share the better
  rank.

  Args:
    samples: generated pictures.
    own: index of the right picture in the bank.
    bank: pictures to tell apart.
  """
  x, y = features(samples), features(bank)
  distance = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None]
  mine = np.take_along_axis(distance, own[:, None], axis=1)
  # Rounding of the expansion above, in units of 255² pixels.
  return 1 + (distance < mine - 1e-1).sum(axis=1)
