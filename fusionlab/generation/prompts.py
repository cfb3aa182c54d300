"""Texts and pictures to the ids of a prompt, and ids back to what they show."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from PIL import Image

from fusionlab.batch import Vocabulary
from fusionlab.data.sources.pictures import as_rgb, read_picture, square
from fusionlab.errors import UserError
from fusionlab.tokenizers import Tokenizers

# A text, a picture's file, or a picture.
Part: TypeAlias = str | Path | np.ndarray | Image.Image
Prompt: TypeAlias = Part | Sequence[Part]
PARTS = (str, Path, np.ndarray, Image.Image)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """A document, or its beginning, as a model takes it.

  Attributes:
    ids: of the shared vocabulary.
    latents: values of the ids that stand for patches of continuous pictures, in
      order; None where there is none.
  """

  ids: list[int]
  latents: Float[np.ndarray, "_ C"] | None = None


def encode(prompt: Prompt, tokenizers: Tokenizers) -> Encoded:
  """The beginning of a document: `<bos>`, then the parts in order.

  Args:
    prompt: a text or a picture, or several of them in any order. A picture is a
      path, an array uint8 [H, W, 3] or a PIL image; its middle square is taken.
    tokenizers: of the model.

  Raises:
    UserError: a part of another type, a file that is no picture, or a picture
      where the model is of text only.
  """
  vocabulary = tokenizers.vocabulary
  ids, latents = [vocabulary.bos], []
  for part in [prompt] if isinstance(prompt, PARTS) else prompt:
    if isinstance(part, str):
      ids += tokenizers.text.encode(part)
      continue
    pixels, pictures = _pixels(part), tokenizers.pictures("a prompt's picture")
    codes = pictures.encode(square(pixels, pictures.image_size)[None])[0]
    image = vocabulary.index("image")
    if image in vocabulary.continuous:
      latents.append(codes)
      codes = np.zeros(len(codes), np.int64)
    ids.append(vocabulary.begin[image])
    ids += (codes + vocabulary.offset(image)).tolist()
    ids.append(vocabulary.end[image])
  return Encoded(ids, np.concatenate(latents) if latents else None)


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


def continues(
  ids: Sequence[int] | np.ndarray, at: int, vocabulary: Vocabulary
) -> bool:
  """Whether the id at a place goes on with the text before it.

  Args:
    ids: of a document.
    at: the place.
    vocabulary: tells texts from what stands between them.
  """
  before = int(ids[at - 1]) if at else vocabulary.bos
  return before < vocabulary.ends[0] and before not in vocabulary.specials


def decode(
  documents: Sequence[Sequence[int]],
  tokenizers: Tokenizers,
  *,
  starts: Sequence[int] | None = None,
  latents: Sequence[Float[np.ndarray, "_ C"]] | None = None,
) -> list[list[str | np.ndarray]]:
  """What ids show: of each document its texts and pictures in order.

  Args:
    documents: ids with whole blocks; specials outside of blocks show nothing.
    tokenizers: of the model.
    starts: first id of each document that is shown; default 0.
    latents: of each document, values of all of its patches; needed where its
      pictures are continuous.

  Returns:
    Per document str and uint8 [S, S, 3].

  Raises:
    UserError: a block that is not whole.
  """
  vocabulary, lengths = tokenizers.vocabulary, tokenizers.block_lengths
  parts: list[list[Any]] = []
  codes: list[np.ndarray] = []
  values = latents or [np.zeros((0, 0), np.float32)] * len(documents)

  def show(text: Sequence[int], first: int, ids: Sequence[int]) -> None:
    goes_on = continues(ids, first, vocabulary)
    parts[-1].append(tokenizers.text.decode(text, continues=goes_on))

  for ids, first, patches in zip(
    documents, starts or [0] * len(documents), values, strict=True
  ):
    modality = vocabulary.modality_of(np.asarray(ids))
    before = np.cumsum(np.isin(modality, vocabulary.continuous))
    parts.append([])
    at = first
    while at < len(ids):
      if ids[at] not in vocabulary.begin[1:]:
        at += 1
        continue
      image = vocabulary.begin.index(ids[at], 1)
      number = lengths[image]
      block = np.asarray(ids[at + 1 : at + 1 + number])
      if len(block) < number:
        raise UserError(
          f"the ids end after {len(block)} of a picture's {number} codes"
        )
      show(ids[first:at], first, ids)
      parts[-1].append(len(codes))
      if image in vocabulary.continuous:
        # The begin is no patch: those up to it are those before the picture.
        codes.append(patches[before[at] : before[at] + number])
      else:
        codes.append(block - vocabulary.offset(image))
      at += number + 2
      first = at
    show(ids[first:], first, ids)
  # All pictures at once: the decoder takes them by the dozen.
  pictures: Any = []
  if codes:
    pictures = tokenizers.pictures("a picture").decode(np.stack(codes))
  return [
    [pictures[p] if isinstance(p, int) else p for p in shown if p != ""]
    for shown in parts
  ]
