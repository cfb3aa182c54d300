"""Small stand-ins with the interfaces of sources and tokenizers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fusionlab.batch import Vocabulary
from fusionlab.data.config import SourceConfig
from fusionlab.data.documents import Counts, Record
from fusionlab.data.plan import Stream
from fusionlab.data.sources import Example, Part
from fusionlab.tokenizers import ImageTokenizer, Tokenizers

SPECIALS = 5
TEXT_IDS = SPECIALS + 256
CODES = 8
VOCABULARY = Vocabulary(("text", "image"), (TEXT_IDS, 16))


class FakeText:
  """One id per byte of UTF-8."""

  vocab_size = TEXT_IDS
  hash = "text"

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [[SPECIALS + b for b in t.encode()] for t in texts]

  def byte_lengths(self) -> np.ndarray:
    return (np.arange(TEXT_IDS) >= SPECIALS).astype(np.int32)


class FakeImage(ImageTokenizer):
  """Eight codes: the picture's first column, divided by 16."""

  codebook_size = 16
  codes_per_image = CODES
  image_size = 8
  hash = "image"

  def __init__(self):
    """Reads no file."""

  def encode(self, images: np.ndarray) -> np.ndarray:
    assert images.shape[1:] == (8, 8, 3)
    assert images.dtype == np.uint8
    return (images[:, :, 0, 0] // 16).astype(np.int32)


def fake_tokenizers(hash: str = "both") -> Tokenizers:
  text: Any = FakeText()
  image: Any = FakeImage()
  return Tokenizers(text=text, image=image, vocabulary=VOCABULARY, hash=hash)


class FakeSource:
  """Captioned pictures, texts and one interleaved document."""

  pictures = 40
  texts = 60

  def __init__(self, config: SourceConfig, name: str):
    self.config, self.name = config, name

  def __len__(self) -> int:
    return self.pictures + self.texts + 1

  def fingerprint(self) -> str:
    return f"fake-{self.config.path}"

  def examples(self) -> Iterator[Example]:
    rng = np.random.default_rng(0)
    for i in range(self.pictures):
      split = "heldout_picture" if i % 10 == 9 else "train"
      image = rng.integers(0, 256, (8, 8, 3), np.uint8)
      captions = (f"picture {i}", f"bild nummer {i}", f"画 {i}")
      yield Example(
        f"p{i}", split, (Part("text", captions), Part("image", (image,)))
      )
    for i in range(self.texts):
      split = "heldout_text" if i % 10 == 9 else "train"
      text = "".join(chr(97 + c) for c in rng.integers(0, 26, 5 + 4 * i))
      yield Example(f"t{i}", split, (Part("text", (text,)),))
    image = np.full((8, 8, 3), 255, np.uint8)
    parts = (
      Part("text", ("a",)),
      Part("image", (image,)),
      Part("text", ("b",)),
    )
    yield Example("mixed", "train", parts)


def picture_counts(
  number: int, rng: np.random.Generator, captions: int = 3, codes: int = 64
) -> Counts:
  """Shapes of captioned pictures: 6-35 caption tokens and `codes` codes."""
  length = np.full((number, captions + 1), codes)
  length[:, :captions] = rng.integers(6, 36, (number, captions))
  return Counts(
    parts=np.full(number, 2, np.int32),
    part_modality=np.tile([0, 1], number).astype(np.int32),
    part_alternatives=np.tile([captions, 1], number).astype(np.int32),
    lengths=length.reshape(-1).astype(np.int32),
  )


def text_counts(lengths: Sequence[int] | np.ndarray) -> Counts:
  """Shapes of texts."""
  number = len(lengths)
  return Counts(
    parts=np.ones(number, np.int32),
    part_modality=np.zeros(number, np.int32),
    part_alternatives=np.ones(number, np.int32),
    lengths=np.asarray(lengths, np.int32),
  )


def passage_counts(number: int, rng: np.random.Generator) -> Counts:
  """Shapes of passages: 60-700 tokens, log-normal, mean about 160."""
  lengths = rng.lognormal(np.log(160) - 0.18, 0.6, number)
  return text_counts(np.clip(lengths, 60, 700).astype(np.int32))


def random_counts(number: int, rng: np.random.Generator) -> Counts:
  """Shapes of any form: 1-4 parts, text or image, 1-3 alternatives of text."""
  parts = rng.integers(1, 5, number)
  modality = rng.integers(0, 2, parts.sum())
  alternatives = np.where(modality == 0, rng.integers(1, 4, len(modality)), 1)
  of = np.repeat(modality, alternatives)
  lengths = np.where(of == 1, CODES, rng.integers(1, 12, len(of)))
  return Counts(
    parts=parts.astype(np.int32),
    part_modality=modality.astype(np.int32),
    part_alternatives=alternatives.astype(np.int32),
    lengths=lengths.astype(np.int32),
  )


def records_of(counts: Counts, vocabulary: Vocabulary = VOCABULARY) -> list:
  """Records with these shapes; no id occurs by chance at two places."""
  records = []
  rng = np.random.default_rng(1)
  for n in range(len(counts)):
    part = slice(counts.part_start[n], counts.part_start[n + 1])
    first = counts.alternative_start[part.start]
    lengths = counts.lengths[first : counts.alternative_start[part.stop]]
    alternatives = counts.part_alternatives[part]
    of = np.repeat(np.repeat(counts.part_modality[part], alternatives), lengths)
    low = np.where(of == 0, SPECIALS, vocabulary.offset(1))
    high = np.where(of == 0, vocabulary.sizes[0], vocabulary.size)
    records.append(
      Record(
        key=str(n),
        part_modality=counts.part_modality[part],
        part_alternatives=alternatives,
        lengths=lengths,
        ids=rng.integers(low, high).astype(np.int32),
      )
    )
  return records


def default_mixture(
  pictures: int = 3500, passages: int = 4200, seed: int = 0
) -> list[Stream]:
  """Streams shaped like the default data."""
  rng = np.random.default_rng(seed)
  return [
    Stream("pictures", picture_counts(pictures, rng), 2.0),
    Stream("passages", passage_counts(passages, rng), 0.5),
  ]
