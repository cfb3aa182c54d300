"""Tokenizers: text and pictures become ids of one shared vocabulary."""

import dataclasses
from pathlib import Path

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.text import TextTokenizer

__all__ = [
  "ImageTokenizer",
  "TextTokenizer",
  "Tokenizers",
  "load_tokenizers",
  "make_tokenizers",
]

NO_IMAGE = "none"


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a run and the vocabulary they share.

  Attributes:
    text: text ids; its range comes first and holds the special ids.
    image: picture codes; their range follows. None where there is text only.
    vocabulary: the ranges.
    hash: SHA-256 of the files' hashes, 64 hex digits.
  """

  text: TextTokenizer
  image: ImageTokenizer | None
  vocabulary: Vocabulary
  hash: str

  @property
  def block_lengths(self) -> tuple[int, ...]:
    """Codes of one block of each modality; 0 for text."""
    if self.image is None:
      return (0,)
    return (0, self.image.codes_per_image)

  def pictures(self, what: str) -> ImageTokenizer:
    """The image tokenizer, for what cannot do without.

    Args:
      what: needs it, for the message ("a picture in a prompt").

    Raises:
      UserError: there is none.
    """
    if self.image is None:
      raise UserError(
        f"{what} needs an image tokenizer, and this model is of text only"
        f" (config.data.image_tokenizer={NO_IMAGE!r})"
      )
    return self.image

  def save(self, folder: str | Path) -> None:
    """Writes the files into a folder, so that it needs no other.

    Raises:
      UserError: the folder cannot be written.
    """
    self.text.save(Path(folder) / storage.TEXT_FILE)
    if self.image is not None:
      self.image.save(Path(folder) / storage.IMAGE_FILE)
    else:
      # Said, so that a picture tokenizer that got lost is not taken for none.
      storage.write(Path(folder) / storage.NO_IMAGE_FILE, b"")

  @classmethod
  def from_folder(cls, folder: str | Path) -> "Tokenizers":
    """Reads what `save` wrote; the hash is the same.

    Raises:
      UserError: a file is missing or is not a tokenizer.
    """
    folder = Path(folder)
    alone = (folder / storage.NO_IMAGE_FILE).exists()
    return load_tokenizers(
      str(folder / storage.TEXT_FILE),
      NO_IMAGE if alone else str(folder / storage.IMAGE_FILE),
    )


def make_tokenizers(
  text: TextTokenizer, image: ImageTokenizer | None = None
) -> Tokenizers:
  """Puts tokenizers into one vocabulary.

  Args:
    text: where there are pictures too and it has no ids around them, they are
      appended to its range.
    image: None makes a vocabulary of text only.
  """
  if image is None:
    vocabulary = _vocabulary(("text",), (text.vocab_size,), text)
    return Tokenizers(
      text, None, vocabulary, storage.sha256(text.hash.encode())
    )
  text = text.with_picture_borders()
  vocabulary = _vocabulary(
    ("text", "image"), (text.vocab_size, image.codebook_size), text
  )
  both = storage.sha256((text.hash + image.hash).encode())
  return Tokenizers(text, image, vocabulary, both)


def _vocabulary(
  modalities: tuple[str, ...], sizes: tuple[int, ...], text: TextTokenizer
) -> Vocabulary:
  special = text.specials
  borders = len(modalities) - 1
  return Vocabulary(
    modalities,
    sizes,
    pad=special.pad,
    bos=special.bos,
    eos=special.eos,
    begin=(0, *(special.boi or 0,) * borders),
    end=(0, *(special.eoi or 0,) * borders),
  )


def load_tokenizers(text_path: str = "", image_path: str = "") -> Tokenizers:
  """Reads both tokenizers; '' is the packaged file.

  Args:
    text_path: see `TextTokenizer.load`.
    image_path: see `ImageTokenizer.load`; 'none' is text only.

  Raises:
    UserError: a file is missing or is not a tokenizer.
  """
  text = TextTokenizer.load(text_path)
  if image_path == NO_IMAGE:
    return make_tokenizers(text)
  return make_tokenizers(text, ImageTokenizer.load(image_path))
