"""Captioned pictures of a split and the documents that score them.

What is said of pictures holds for a part of any modality but text: a captioned
example is a text and then one such part. The first alternative of each part is
taken.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.data.documents import Record, document_latents, offsets
from fusionlab.data.preparation import Prepared
from fusionlab.errors import UserError, nearest


def _no_latents() -> np.ndarray:
  return np.zeros((0, 0), np.float32)


@dataclasses.dataclass(frozen=True)
class Captioned:
  """One captioned picture.

  Attributes:
    source: name of its source.
    index: of its record in the source's split.
    key: name of the example within its source.
    modality: id of the picture's modality.
    caption: text ids.
    codes: ids of the picture's codes, in the shared vocabulary; of a continuous
      picture its one id, once a patch.
    latents: float32, values of a continuous picture's patches; none of codes.
  """

  source: str
  index: int
  key: str
  modality: int
  caption: Int[np.ndarray, " T"]
  codes: Int[np.ndarray, " C"]
  latents: Float[np.ndarray, "n c"] = dataclasses.field(
    default_factory=_no_latents
  )

  @property
  def picture(self) -> bytes:
    """The same for the same picture, and for no other."""
    return self.codes.tobytes() + self.latents.tobytes()


@dataclasses.dataclass(frozen=True)
class Document:
  """What is scored, and in which surroundings.

  Attributes:
    ids: of the whole document.
    span: [start, stop) of what is scored.
    latents: float32, values of the document's patches, in order.
  """

  ids: list[int]
  span: tuple[int, int]
  latents: Float[np.ndarray, "n c"] = dataclasses.field(
    default_factory=_no_latents
  )


def captioned_examples(
  prepared: Mapping[str, Prepared],
  split: str,
  vocabulary: Vocabulary,
  *,
  modality: str = "image",
  limit: int = 0,
  seed: int = 0,
) -> list[Captioned]:
  """Reads captioned pictures of a split, of all sources that have it.

  Args:
    prepared: the sources' prepared datasets, by name.
    split: its name.
    vocabulary: the shared vocabulary.
    modality: of the pictures.
    limit: how many, drawn at random without replacement; 0: all, in stored
      order.
    seed: of the draw.

  Returns:
    At most `limit` examples; none where the split has no captioned picture.

  Raises:
    UserError: a modality or split that does not exist.
  """
  wanted = vocabulary.index(modality)
  splits = {s for p in prepared.values() for s in p.splits}
  if split not in splits:
    raise UserError(f"no source has a split {split!r}{nearest(split, splits)}")
  places = []
  for name, source in prepared.items():
    if split in source.splits:
      counts = source.counts(split)
      rows = np.flatnonzero(counts.captioned)
      last = counts.part_start[rows + 1] - 1
      rows = rows[counts.part_modality[last] == wanted]
      places += [(name, int(row)) for row in rows]
  if limit:
    order = np.random.default_rng(seed).permutation(len(places))
    places = [places[i] for i in order]
  chosen = [
    _example(name, row, prepared[name].records(split)[row], vocabulary)
    for name, row in places[: limit or None]
  ]
  return chosen


def distinct(examples: Sequence[Captioned], limit: int) -> list[Captioned]:
  """The first examples of which no two have a caption or a picture in common.

  Args:
    examples: in any order.
    limit: how many at most.
  """
  chosen: list[Captioned] = []
  seen: set[bytes] = set()
  for example in examples:
    marks = {example.caption.tobytes(), example.picture}
    if len(chosen) == limit:
      break
    if not marks & seen:
      seen |= marks
      chosen.append(example)
  return chosen


def _example(
  source: str, index: int, record: Record, vocabulary: Vocabulary
) -> Captioned:
  starts = offsets(record.lengths)
  picture = int(record.part_alternatives[0])
  return Captioned(
    source=source,
    index=index,
    key=record.key,
    modality=int(record.part_modality[1]),
    caption=record.ids[: starts[1]],
    codes=record.ids[starts[picture] : starts[picture + 1]],
    latents=document_latents(
      record, vocabulary, reversed=False, alternative=np.zeros(2, np.int64)
    ),
  )


def picture_after_caption(
  caption: Captioned | None, picture: Captioned, vocabulary: Vocabulary
) -> Document:
  """`<bos> caption <boi> codes <eoi>`; the codes are scored.

  Args:
    caption: whose caption is read; None leaves it out, as training does for a
      part of the pictures.
    picture: whose codes are scored.
    vocabulary: gives the special ids.
  """
  words = [] if caption is None else caption.caption.tolist()
  codes, kind = picture.codes.tolist(), picture.modality
  before = [vocabulary.bos, *words, vocabulary.begin[kind]]
  return Document(
    [*before, *codes, vocabulary.end[kind]],
    (len(before), len(before) + len(codes)),
    picture.latents,
  )


def caption_after_picture(
  caption: Captioned, picture: Captioned, vocabulary: Vocabulary
) -> Document:
  """`<bos> <boi> codes <eoi> caption <eos>`; caption and `<eos>` are scored.

  The end is scored too, else a caption's beginning would beat it.

  Args:
    caption: whose caption is scored.
    picture: whose codes are read.
    vocabulary: gives the special ids.
  """
  codes, kind = picture.codes.tolist(), picture.modality
  before = [
    vocabulary.bos,
    vocabulary.begin[kind],
    *codes,
    vocabulary.end[kind],
  ]
  ids = [*before, *caption.caption.tolist(), vocabulary.eos]
  return Document(ids, (len(before), len(ids)), picture.latents)


def caption_alone(caption: Captioned, vocabulary: Vocabulary) -> Document:
  """`<bos> caption <boi>`; caption and `<boi>` are scored.

  In training a caption that comes first ends in its picture's `<boi>`, which
  closes it as `<eos>` does after a picture.

  Args:
    caption: whose caption is scored.
    vocabulary: gives the special ids.
  """
  words = caption.caption.tolist()
  ids = [vocabulary.bos, *words, vocabulary.begin[caption.modality]]
  return Document(ids, (1, len(ids)))
