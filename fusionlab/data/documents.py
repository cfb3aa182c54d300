"""From a record to a document: which caption, in which order, or none.

A document is `<bos> parts <eos>`. A text part is its ids; a part of another
modality stands between its own `<begin>` and `<end>` ids (for a picture,
`<boi> codes <eoi>`). A record whose parts are a text and then something else is
a captioned picture, and three things about it are drawn anew in every pass over
its source: whether the picture comes first, whether the caption is dropped (for
guidance), and which of the caption's alternatives (languages) is read. Records
of any other form keep their order and all their parts.

The draws are functions of (seed, source, pass, document, what is drawn) by a
counter-based hash, so they depend on no order, worker or host, and token counts
follow without reading a record.
"""

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from fusionlab.batch import Vocabulary

# What is drawn; each has a stream of its own.
SHUFFLE, MIX, ORDER, DROP, FIRST, OTHER = range(6)


@dataclasses.dataclass(frozen=True)
class Record:
  """One prepared example: every part with all its alternatives, as ids.

  Attributes:
    key: name of the example within its source.
    part_modality: int32 [P], modality of each part.
    part_alternatives: int32 [P], number of alternatives of each part.
    lengths: int32 [sum of alternatives], ids of each alternative.
    ids: int32 [sum of lengths], ids in the shared vocabulary.
    latents: float32, values of the continuous ones among them, in order; none
      without continuous modalities.
  """

  key: str
  part_modality: Int[np.ndarray, " P"]
  part_alternatives: Int[np.ndarray, " P"]
  lengths: Int[np.ndarray, " A"]
  ids: Int[np.ndarray, " N"]
  latents: Float[np.ndarray, "n C"] = dataclasses.field(
    default_factory=lambda: np.zeros((0, 0), np.float32)
  )


@dataclasses.dataclass(frozen=True)
class Counts:
  """The shapes of all records of a split, ragged arrays laid end to end.

  Attributes:
    parts: int32 [n], number of parts of each record.
    part_modality, part_alternatives: int32 [sum of parts].
    lengths: int32 [sum of alternatives].
  """

  parts: Int[np.ndarray, " n"]
  part_modality: Int[np.ndarray, " P"]
  part_alternatives: Int[np.ndarray, " P"]
  lengths: Int[np.ndarray, " A"]

  def __len__(self) -> int:
    return len(self.parts)

  @functools.cached_property
  def part_start(self) -> Int[np.ndarray, " _"]:
    """First part of each record."""
    return offsets(self.parts)

  @functools.cached_property
  def alternative_start(self) -> Int[np.ndarray, " _"]:
    """First alternative of each part."""
    return offsets(self.part_alternatives)

  @functools.cached_property
  def captioned(self) -> Bool[np.ndarray, " _"]:
    """Records that are a text and then one part of another modality."""
    captioned = self.parts == 2
    first = self.part_start[:-1][captioned]
    captioned[captioned] = (self.part_modality[first] == 0) & (
      self.part_modality[first + 1] != 0
    )
    return captioned

  @functools.cached_property
  def pictured(self) -> Bool[np.ndarray, " _"]:
    """Records with a part that is not text."""
    owner = np.repeat(np.arange(len(self)), self.parts)
    return np.bincount(owner, self.part_modality, len(self)) > 0


class Draws(NamedTuple):
  """What is decided about some documents, ragged over their parts.

  Attributes:
    reversed: bool [n], the picture comes before its caption.
    dropped: bool [n], the caption is left out.
    alternative: int64 [sum of parts], index within the part's alternatives.
  """

  reversed: Bool[np.ndarray, " n"]
  dropped: Bool[np.ndarray, " n"]
  alternative: Int[np.ndarray, " P"]


class Chances(NamedTuple):
  """Probabilities of the draws; the defaults decide nothing at random.

  Attributes:
    image_first: a picture precedes its caption.
    caption_drop: a picture loses its caption.
    first_caption: a caption is its first alternative; the others share the
      rest equally.
  """

  image_first: float = 0.0
  caption_drop: float = 0.0
  first_caption: float = 1.0


def offsets(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n+1"]:
  """Starts of consecutive runs of `counts` elements, and the end."""
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ragged(
  starts: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " m"]:
  """Indices `starts[i], …, starts[i] + counts[i] - 1` for all i, in order."""
  counts = np.asarray(counts, np.int64)
  shift = np.asarray(starts, np.int64) - offsets(counts)[:-1]
  return np.repeat(shift, counts) + np.arange(counts.sum())


def stream_key(name: str) -> int:
  """A 64-bit number that stands for a source's name in the hash."""
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def hashed(*counters: int | np.ndarray) -> UInt64[np.ndarray, "*s"]:
  """A counter-based hash: 64 random bits for each tuple of counters.

  Counters are absorbed one after another by the finaliser of SplitMix64
  (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
  OOPSLA 2014).

  Args:
    *counters: integers and integer arrays that broadcast together.
  """
  golden = 0x9E3779B97F4A7C15
  state = np.zeros(1, np.uint64)
  for counter in counters:
    if isinstance(counter, np.ndarray):
      counter = counter.astype(np.uint64)
    else:
      counter = np.array([counter % 2**64], np.uint64)
    state = (state ^ counter) + np.uint64(golden)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
  return state


def uniform(*counters: int | np.ndarray) -> Float[np.ndarray, "*s"]:
  """A number in [0, 1) for each tuple of counters (see `hashed`)."""
  return (hashed(*counters) >> np.uint64(11)) * 2.0**-53


def draw(
  counts: Counts,
  documents: Int[np.ndarray, " n"],
  passes: Int[np.ndarray, " n"],
  *,
  seed: int,
  source: int,
  chances: Chances,
) -> Draws:
  """Decides about documents of one source.

  Args:
    counts: the source's shapes.
    documents: record indices.
    passes: pass over the source in which each document is read.
    seed: root of the draws.
    source: `stream_key` of the source's name.
    chances: probabilities.
  """
  captioned = counts.captioned[documents]

  def happens(what: int, probability: float) -> np.ndarray:
    number = uniform(seed, source, what, passes, documents)
    return captioned & (number < probability)

  parts = counts.parts[documents]
  part = ragged(counts.part_start[documents], parts)
  number = counts.part_alternatives[part].astype(np.int64)
  who = np.repeat(documents, parts)
  when = np.repeat(passes, parts)
  which = ragged(np.zeros_like(parts), parts)
  other = uniform(seed, source, OTHER, when, who, which)
  other = 1 + np.floor(other * (number - 1)).astype(np.int64)
  first = uniform(seed, source, FIRST, when, who, which) < chances.first_caption
  return Draws(
    reversed=happens(ORDER, chances.image_first),
    dropped=happens(DROP, chances.caption_drop),
    alternative=np.where(first | (number == 1), 0, other),
  )


def document_lengths(
  counts: Counts,
  documents: Int[np.ndarray, " n"],
  draws: Draws,
  num_modalities: int,
) -> Int[np.ndarray, "n K"]:
  """Tokens of each modality in each document, without reading a record."""
  parts = counts.parts[documents]
  part = ragged(counts.part_start[documents], parts)
  modality = counts.part_modality[part]
  length = counts.lengths[counts.alternative_start[part] + draws.alternative]
  owner = np.repeat(np.arange(len(documents)), parts)
  length = np.where((modality == 0) & draws.dropped[owner], 0, length)
  n = len(documents)
  cells = np.bincount(
    owner * num_modalities + modality, length, n * num_modalities
  )
  tokens = cells.reshape(n, num_modalities).astype(np.int64)
  brackets = np.bincount(owner, modality != 0, n).astype(np.int64)
  tokens[:, 0] += 2 + 2 * brackets
  return tokens


def expected_lengths(
  counts: Counts, chances: Chances, num_modalities: int
) -> Float[np.ndarray, " K"]:
  """Tokens of each modality in one pass, in expectation over the draws."""
  number = counts.part_alternatives
  first = counts.lengths[counts.alternative_start[:-1]]
  part = np.repeat(np.arange(len(number)), number)
  total = np.bincount(part, counts.lengths, len(number))
  others = (total - first) / np.maximum(number - 1, 1)
  p = chances.first_caption
  length = np.where(number == 1, first, p * first + (1 - p) * others)
  captioned = np.repeat(counts.captioned, counts.parts)
  text = counts.part_modality == 0
  length = np.where(
    captioned & text, (1 - chances.caption_drop) * length, length
  )
  tokens = np.bincount(counts.part_modality, length, num_modalities)
  tokens[0] += 2 * len(counts) + 2 * np.count_nonzero(~text)
  return tokens


def largest_lengths(
  counts: Counts, num_modalities: int
) -> Int[np.ndarray, "n K"]:
  """Tokens of each modality with every part's longest alternative."""
  longest = np.zeros(len(counts.part_alternatives), np.int64)
  part = np.repeat(np.arange(len(longest)), counts.part_alternatives)
  np.maximum.at(longest, part, counts.lengths)
  n = len(counts)
  whole = Counts(
    parts=counts.parts,
    part_modality=counts.part_modality,
    part_alternatives=np.ones_like(counts.part_alternatives),
    lengths=longest,
  )
  nothing = np.zeros(n, bool)
  keep = Draws(nothing, nothing, np.zeros(len(longest), np.int64))
  return document_lengths(whole, np.arange(n), keep, num_modalities)


def document_ids(
  record: Record,
  vocabulary: Vocabulary,
  *,
  reversed: bool,
  dropped: bool,
  alternative: Int[np.ndarray, " P"],
) -> Int[np.ndarray, " T"]:
  """The document's ids; a token's modality is the range its id is in.

  Args:
    record: parts with all their alternatives.
    vocabulary: gives `<bos>`, `<eos>` and the ids around pictures.
    reversed: the parts come in reverse order.
    dropped: the text is left out.
    alternative: which alternative of each part is read.
  """
  starts = offsets(record.lengths)
  blocks = []
  first = 0
  for part, modality in enumerate(record.part_modality):
    which = first + alternative[part]
    first += record.part_alternatives[part]
    ids = record.ids[starts[which] : starts[which + 1]]
    if modality:
      blocks.append(
        [[vocabulary.begin[modality]], ids, [vocabulary.end[modality]]]
      )
    elif not dropped:
      blocks.append([ids])
  if reversed:
    blocks.reverse()
  pieces = [piece for block in blocks for piece in block]
  return np.concatenate([[vocabulary.bos], *pieces, [vocabulary.eos]]).astype(
    np.int32
  )


def document_latents(
  record: Record,
  vocabulary: Vocabulary,
  *,
  reversed: bool,
  alternative: Int[np.ndarray, " P"],
) -> Float[np.ndarray, "n C"]:
  """The values of the document's continuous positions, in its order.

  Args:
    record: parts with all their alternatives.
    vocabulary: says which modalities are continuous.
    reversed: the parts come in reverse order.
    alternative: which alternative of each part is read.
  """
  owner = np.repeat(record.part_modality, record.part_alternatives)
  held = np.where(np.isin(owner, vocabulary.continuous), record.lengths, 0)
  starts = offsets(held)
  chosen = offsets(record.part_alternatives)[:-1] + alternative
  pieces = [record.latents[starts[a] : starts[a + 1]] for a in chosen]
  if reversed:
    pieces.reverse()
  nothing = np.zeros((0, vocabulary.latent_dim), np.float32)
  return np.concatenate([nothing, *pieces]) if len(record.latents) else nothing
