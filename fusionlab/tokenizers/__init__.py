"""Tokenizers: text and pictures become ids of one shared vocabulary."""

import dataclasses
from pathlib import Path

from fusionlab.batch import Vocabulary
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.text import TextTokenizer

__all__ = ["ImageTokenizer", "TextTokenizer", "Tokenizers", "load_tokenizers"]


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a run and the vocabulary they share.

  Attributes:
    text: text ids; its range comes first and holds the special ids.
    image: picture codes; their range follows.
    vocabulary: the ranges.
    hash: SHA-256 of both files' hashes, 64 hex digits.
  """

  text: TextTokenizer
  image: ImageTokenizer
  vocabulary: Vocabulary
  hash: str

  def save(self, folder: str | Path) -> None:
    """Writes both files into a folder, so that it needs no other.

    Raises:
      UserError: the folder cannot be written.
    """
    self.text.save(Path(folder) / storage.TEXT_FILE)
    self.image.save(Path(folder) / storage.IMAGE_FILE)

  @classmethod
  def from_folder(cls, folder: str | Path) -> "Tokenizers":
    """Reads what `save` wrote; the hash is the same.

    Raises:
      UserError: a file is missing or is not a tokenizer.
    """
    return load_tokenizers(
      str(Path(folder) / storage.TEXT_FILE),
      str(Path(folder) / storage.IMAGE_FILE),
    )


def load_tokenizers(text_path: str = "", image_path: str = "") -> Tokenizers:
  """Reads both tokenizers; '' is the packaged file.

  Raises:
    UserError: a file is missing or is not a tokenizer.
  """
  text = TextTokenizer.load(text_path)
  image = ImageTokenizer.load(image_path)
  vocabulary = Vocabulary(
    modalities=("text", "image"),
    sizes=(text.vocab_size, image.codebook_size),
  )
  both = storage.sha256((text.hash + image.hash).encode())
  return Tokenizers(text, image, vocabulary, both)
