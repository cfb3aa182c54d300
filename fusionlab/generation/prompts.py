"""Texts and pictures to the ids of a prompt, and ids back to what they show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fusionlab.data.sources.pictures import as_rgb, read_picture, square
from fusionlab.errors import UserError
from fusionlab.tokenizers import Tokenizers

# A text, a picture's file, or a picture.
Part: TypeAlias = str | Path | np.ndarray | Image.Image
Prompt: TypeAlias = Part | Sequence[Part]
PARTS = (str, Path, np.ndarray, Image.Image)


def encode(prompt: Prompt, tokenizers: Tokenizers) -> list[int]:
  """Ids of the beginning of a document: `<bos>`, then the parts in order.

  Args:
    prompt: a text or a picture, or several of them in any order. A picture is a
      path, an array uint8 [H, W, 3] or a PIL image; its middle square is taken.
    tokenizers: of the model.

  Raises:
    UserError: a part of another type, or a file that is no picture.
  """
  vocabulary = tokenizers.vocabulary
  image = 1
  ids = [vocabulary.bos]
  for part in [prompt] if isinstance(prompt, PARTS) else prompt:
    if isinstance(part, str):
      ids += tokenizers.text.encode(part)
      continue
    codes = tokenizers.image.encode(
      square(_pixels(part), tokenizers.image.image_size)[None]
    )[0]
    ids.append(vocabulary.begin[image])
    ids += (codes + vocabulary.offset(image)).tolist()
    ids.append(vocabulary.end[image])
  return ids


def _pixels(part: Part) -> np.ndarray:
  if isinstance(part, Path):
    try:
      return read_picture(part.read_bytes(), str(part))
    except OSError as error:
      raise UserError(
        f"cannot read the picture {part}: {error.strerror or error}"
      ) from error
  if isinstance(part, Image.Image):
    return as_rgb(np.asarray(part.convert("RGB")), "a picture of the prompt")
  if isinstance(part, np.ndarray):
    return as_rgb(part, "a picture of the prompt")
  raise UserError(
    f"a prompt has texts (str) and pictures (Path, array or PIL image), not"
    f" {type(part).__name__}"
  )


def decode(
  documents: Sequence[Sequence[int]], tokenizers: Tokenizers
) -> list[list[str | np.ndarray]]:
  """What ids show: of each document its texts and pictures in order.

  Args:
    documents: ids with whole blocks; specials outside of blocks show nothing.
    tokenizers: of the model.

  Returns:
    Per document str and uint8 [S, S, 3].

  Raises:
    UserError: a block that is not whole.
  """
  vocabulary = tokenizers.vocabulary
  image, number = 1, tokenizers.image.codes_per_image
  parts: list[list[Any]] = []
  codes: list[np.ndarray] = []
  for ids in documents:
    parts.append([])
    at, text = 0, []
    while at < len(ids):
      if ids[at] != vocabulary.begin[image]:
        text.append(int(ids[at]))
        at += 1
        continue
      block = np.asarray(ids[at + 1 : at + 1 + number])
      if len(block) < number:
        raise UserError(
          f"the ids end after {len(block)} of a picture's {number} codes"
        )
      parts[-1] += [tokenizers.text.decode(text), len(codes)]
      codes.append(block - vocabulary.offset(image))
      at, text = at + number + 2, []
    parts[-1].append(tokenizers.text.decode(text))
  # All pictures at once: the decoder takes them by the dozen.
  pictures = tokenizers.image.decode(np.stack(codes)) if codes else []
  return [
    [pictures[p] if isinstance(p, int) else p for p in shown if p != ""]
    for shown in parts
  ]
