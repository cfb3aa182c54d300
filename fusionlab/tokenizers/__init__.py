"""Tokenizers: text and pictures become ids of one shared vocabulary."""

import dataclasses
from pathlib import Path

from fusionlab.batch import LatentGrid, Vocabulary
from fusionlab.errors import UserError
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.latents import LatentTokenizer
from fusionlab.tokenizers.picture_file import MAKER, read_entry
from fusionlab.tokenizers.text import TextTokenizer

__all__ = [
  "ImageTokenizer",
  "LatentTokenizer",
  "TextTokenizer",
  "Tokenizers",
  "load_picture_tokenizer",
  "load_tokenizers",
  "make_tokenizers",
]

NO_IMAGE = "none"
KL_IMAGE = "kl"


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a run and the vocabulary they share.

  Attributes:
    text: text ids; its range comes first and holds the special ids.
    image: picture codes, whose range follows, or continuous latents, whose one
      id does. None where there is text only.
    vocabulary: the ranges.
    hash: SHA-256 of the files' hashes, 64 hex digits.
  """

  text: TextTokenizer
  image: ImageTokenizer | LatentTokenizer | None
  vocabulary: Vocabulary
  hash: str

  @property
  def block_lengths(self) -> tuple[int, ...]:
    """Positions of one block of each modality; 0 for text."""
    if self.image is None:
      return (0,)
    if isinstance(self.image, LatentTokenizer):
      return (0, self.image.grid.positions)
    return (0, self.image.codes_per_image)

  def pictures(self, what: str) -> ImageTokenizer | LatentTokenizer:
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
  text: TextTokenizer, image: ImageTokenizer | LatentTokenizer | None = None
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
  continuous = isinstance(image, LatentTokenizer)
  vocabulary = _vocabulary(
    ("text", "image"),
    (text.vocab_size, 1 if continuous else image.codebook_size),
    text,
    (None, image.grid) if continuous else (),
  )
  both = storage.sha256((text.hash + image.hash).encode())
  return Tokenizers(text, image, vocabulary, both)


def _vocabulary(
  modalities: tuple[str, ...],
  sizes: tuple[int, ...],
  text: TextTokenizer,
  grids: tuple[LatentGrid | None, ...] = (),
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
    grids=grids,
  )


def load_tokenizers(
  text_path: str = "", image_path: str = "", *, latent_patch: int = 0
) -> Tokenizers:
  """Reads both tokenizers; '' is the packaged file.

  Args:
    text_path: see `TextTokenizer.load`.
    image_path: see `load_picture_tokenizer`; 'none' is text only.
    latent_patch: see `load_picture_tokenizer`.

  Raises:
    UserError: a file is missing or is not a tokenizer, or has no patches of
      latents where their size is given.
  """
  text = TextTokenizer.load(text_path)
  if image_path == NO_IMAGE:
    if latent_patch:
      raise UserError(_no_latents(latent_patch, "text alone"))
    return make_tokenizers(text)
  image = load_picture_tokenizer(image_path, latent_patch=latent_patch)
  return make_tokenizers(text, image)


def load_picture_tokenizer(
  path: str = "", *, latent_patch: int = 0
) -> ImageTokenizer | LatentTokenizer:
  """Reads a picture tokenizer of either kind.

  Args:
    path: '' is the packaged file of codes, 'kl' the packaged one of continuous
      latents; any other file says itself which it is.
    latent_patch: latents along a side of a position, in place of the file's; 0
      keeps it.

  Raises:
    UserError: no such file, neither kind, or a patch that does not fit: one that
      does not divide the side, or one for codes.
  """
  if path in ("", KL_IMAGE):
    image = LatentTokenizer.load() if path else ImageTokenizer.load()
  else:
    kind, known = "picture tokenizer", (ImageTokenizer, LatentTokenizer)
    content, name = storage.read(path, kind), repr(path)
    verbs = " or ".join(cls.verb for cls in known)
    remedy = f"make one with {MAKER} {verbs}"
    found = read_entry(content, name, kind, remedy)["format"]
    cls = {cls.format: cls for cls in known}.get(found)
    if cls is None:
      formats = " and ".join(repr(cls.format) for cls in known)
      raise UserError(
        f"{kind}: {name} has format {found!r}, this version reads {formats};"
        f" {remedy}"
      )
    image = cls(content, name)
  if not latent_patch:
    return image
  if isinstance(image, ImageTokenizer):
    raise UserError(_no_latents(latent_patch, "picture codes"))
  return image.with_patch(latent_patch)


def _no_latents(latent_patch: int, found: str) -> str:
  return (
    f"latent_patch={latent_patch} is for continuous latents, not for {found};"
    f" leave it at 0, or set image_tokenizer={KL_IMAGE!r}"
  )
