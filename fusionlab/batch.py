"""What flows: the batch, the shared vocabulary and the visibility intervals.

Rows hold packed documents in sequence order, modalities interleaved in any
order. `modality` is the only thing that routes. What a query may see is one
interval of keys, so causal rows, bidirectional spans, windows, prefixes and
padding are all two integer arrays and nobody builds an L×L mask.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import cast

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from fusionlab.errors import UserError, nearest
from fusionlab.intervals import causal_intervals, continuous_spans
from fusionlab.routing import Layout, make_layout

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Batch:
  """One step's rows, `[B, L]` in sequence order.

  Attributes:
    tokens: discrete id in the shared vocabulary; 0 where there is none.
    modality: 0..K-1, index into `Vocabulary.modalities`; 0 on padding.
    segment: document within the row, from 1; 0 is padding.
    position: position within the document, from 0.
    k_start, k_end: the keys [k_start, k_end) of the row that a query sees;
      both 0 on padding.
    target: the next token's id; 0 where there is none.
    weight: loss weight of `target`; 0 at the last position of a document, and
      where a continuous position follows. At a continuous position that of its
      latents: 1 / positions of its span, so that a picture weighs 1.
    layout: where each position stands in its tower's array; None for a model
      with one tower.
    latents: values of the continuous positions, 0 elsewhere; None where all
      modalities are discrete, like the next two.
    span: which of the row's continuous spans (a picture's patches) a position is
      in, from 1; 0 is none.
    time: noise level of the latents, from 0 (clean) to 1; None: all are clean.
    stored: where each position of the sequence stands in the row. None: in order;
      otherwise the row was dealt to context-parallel devices
      (`fusionlab.sharding.batches.split_rows`) and all other fields are in that
      order, while `k_start` and `k_end` go on to count positions of the sequence.
  """

  tokens: Int[Array, "B L"]
  modality: Int[Array, "B L"]
  segment: Int[Array, "B L"]
  position: Int[Array, "B L"]
  k_start: Int[Array, "B L"]
  k_end: Int[Array, "B L"]
  target: Int[Array, "B L"]
  weight: Float[Array, "B L"]
  layout: Layout | None = None
  latents: Float[Array, "B L C"] | None = None
  span: Int[Array, "B L"] | None = None
  time: Float[Array, "B L"] | None = None
  stored: Int[Array, "B L"] | None = None


@dataclasses.dataclass(frozen=True)
class LatentGrid:
  """The latents of one picture, and the patches that are its positions.

  Attributes:
    side: latent pixels along a side.
    channels: c, of a latent pixel.
    patch: k, latent pixels along a side of a patch; divides `side`.
  """

  side: int
  channels: int
  patch: int = 1

  @property
  def positions(self) -> int:
    """Patches n = (side / k)² of a picture, in raster order."""
    return (self.side // self.patch) ** 2

  @property
  def dim(self) -> int:
    """Values C = k²·c of a patch, by row, column and channel."""
    return self.patch**2 * self.channels


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """One id space for all modalities, in disjoint contiguous ranges.

  A continuous modality has one id, which stands at each of its positions and
  says no more than that; the values are `Batch.latents`.

  Attributes:
    modalities: names; the index is the modality id. The first is the text that
      holds the special ids.
    sizes: number of ids of each modality, in the same order.
    pad, bos, eos: ids at document borders, in the first modality's range.
    begin, end: per modality, the ids that open and close one of its blocks
      (BOI and EOI for images), in the first modality's range; the first entry
      is unused. What is given for more modalities than there are is dropped.
    grids: per modality its latents where it is continuous, else None; empty
      where all are discrete. Continuous ones agree in `LatentGrid.dim`.
  """

  modalities: tuple[str, ...]
  sizes: tuple[int, ...]
  pad: int = 0
  bos: int = 1
  eos: int = 2
  begin: tuple[int, ...] = (0, 3)
  end: tuple[int, ...] = (0, 4)
  grids: tuple[LatentGrid | None, ...] = ()

  def __post_init__(self):
    for name in ("begin", "end"):
      kept = tuple(getattr(self, name))[: len(self.modalities)]
      object.__setattr__(self, name, kept)

  @functools.cached_property
  def ends(self) -> tuple[int, ...]:
    """Exclusive end of each modality's range."""
    return tuple(int(n) for n in np.cumsum(self.sizes))

  @property
  def size(self) -> int:
    """Number of ids in all."""
    return self.ends[-1]

  @functools.cached_property
  def specials(self) -> tuple[int, ...]:
    """Ids that stand for no text: of documents, and of blocks' borders."""
    borders = (*self.begin[1:], *self.end[1:])
    return tuple(sorted({self.pad, self.bos, self.eos, *borders}))

  @functools.cached_property
  def continuous(self) -> tuple[int, ...]:
    """Ids of the continuous modalities."""
    return tuple(m for m, grid in enumerate(self.grids) if grid is not None)

  @property
  def placeholders(self) -> tuple[int, ...]:
    """The ids of continuous modalities: none is ever next, so none has p > 0."""
    return tuple(self.offset(m) for m in self.continuous)

  @property
  def latent_dim(self) -> int:
    """Values C of a continuous position; 0 where all modalities are discrete."""
    return max((grid.dim for grid in self.grids if grid), default=0)

  def grid(self, modality: int) -> LatentGrid:
    """Latents of a continuous modality.

    Raises:
      UserError: it is discrete.
    """
    if modality not in self.continuous:
      raise UserError(
        f"{self.modalities[modality]} is a discrete modality: it has ids, and no"
        f" latents"
      )
    return cast(LatentGrid, self.grids[modality])

  def offset(self, modality: int) -> int:
    """First id of a modality's range."""
    return self.ends[modality] - self.sizes[modality]

  def index(self, name: str) -> int:
    """Modality id of a name.

    Raises:
      UserError: an unknown modality, with the nearest name.
    """
    if name not in self.modalities:
      raise UserError(
        f"unknown modality {name!r}{nearest(name, self.modalities)}"
      )
    return self.modalities.index(name)

  def modality_of(self, ids: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """Modality id of each token id, by range (numpy in, numpy out)."""
    if isinstance(ids, np.ndarray):
      return np.searchsorted(self.ends, ids, side="right").astype(np.int32)
    import jax.numpy as jnp

    ends = jnp.asarray(self.ends, ids.dtype)
    return (ids[..., None] >= ends).sum(-1, dtype=jnp.int32)

  def places_of(self, old: "Vocabulary") -> Int[np.ndarray, "{old.size}"]:
    """Where the ids of an older vocabulary are in this one.

    A modality keeps its name and its ids; the text may have got longer at its
    end, and modalities may have been added.

    Args:
      old: what this vocabulary is to be the continuation of.

    Returns:
      int64, this vocabulary's id of each of the old one's.

    Raises:
      UserError: a modality is gone or has other ids, or the ids of documents or
        of a block's borders are others.
    """
    if old.modalities[0] != self.modalities[0]:
      raise UserError(
        f"a vocabulary whose text is {self.modalities[0]!r} cannot continue one"
        f" whose text is {old.modalities[0]!r}; the first modality stays first"
      )
    for name in ("pad", "bos", "eos"):
      _same(name, getattr(old, name), getattr(self, name))
    places = []
    for then, name in enumerate(old.modalities):
      now = self.index(name)
      size, before = self.sizes[now], old.sizes[then]
      if size < before or (then and size != before):
        raise UserError(
          f"the vocabulary has {size} ids of {name}, the older one {before}:"
          f" they are not of one tokenizer; only text may get longer, at its end"
        )
      if then:
        _same(f"the begin of {name}", old.begin[then], self.begin[now])
        _same(f"the end of {name}", old.end[then], self.end[now])
      places.append(self.offset(now) + np.arange(before, dtype=np.int64))
    return np.concatenate(places)


def _same(what: str, old: int, new: int) -> None:
  if old != new:
    raise UserError(
      f"the vocabulary has {what} at id {new}, the older one at id {old}: they"
      f" are not of one tokenizer; keep the text tokenizer"
    )


def packed_batch(
  tokens: Int[np.ndarray, "B L"],
  segment: Int[np.ndarray, "B L"],
  position: Int[np.ndarray, "B L"],
  vocabulary: Vocabulary,
  *,
  towers: Sequence[int] | None = None,
  counts: Sequence[int] = (),
  group_rows: int = 0,
  latents: Float[np.ndarray, "B L C"] | None = None,
  causal: bool = True,
) -> Batch:
  """Completes a batch from its tokens and documents.

  A position sees its document up to itself; a continuous one, unless `causal`,
  up to the end of its span (Transfusion, arXiv 2408.11039, Fig. 4).

  Args:
    tokens: int32, ids of the rows, 0 on padding.
    segment: int32, document within the row, from 1; 0 is padding.
    position: int32, position within the document.
    vocabulary: gives each id's modality.
    towers: tower of each modality; None makes no layout.
    counts: places of each tower in a group, see `make_layout`.
    group_rows: rows of a group.
    latents: float32, values at continuous positions; needed where the vocabulary
      has any.
    causal: whether continuous spans are causal too.

  Raises:
    UserError: latents that the vocabulary does not ask for, or lacks; see
      `make_layout`.
  """
  real = segment > 0
  modality = np.where(real, vocabulary.modality_of(tokens), 0).astype(np.int32)
  k_start, k_end = causal_intervals(segment, position)
  target = np.zeros_like(tokens)
  weight = np.zeros(tokens.shape, np.float32)
  follows = real[:, 1:] & (segment[:, 1:] == segment[:, :-1])
  target[:, :-1] = np.where(follows, tokens[:, 1:], 0)
  weight[:, :-1] = follows
  span = None
  given = 0 if latents is None else latents.shape[-1]
  if given != vocabulary.latent_dim:
    raise UserError(
      f"the batch has {given} latent values a position, the vocabulary"
      f" {vocabulary.latent_dim}"
    )
  if vocabulary.continuous:
    inside = real & np.isin(modality, vocabulary.continuous)
    kinds = len(vocabulary.modalities)
    span, first, end = continuous_spans(inside, segment * kinds + modality)
    # What comes next is no id before a patch, and needs no saying after one: how
    # many there are is known (Transfusion, section 3.2).
    weight[:, :-1][inside[:, 1:]] = 0
    target[:, :-1][inside[:, 1:]] = 0
    weight[inside] = 1 / (end - first)[inside]
    if not causal:
      k_end = np.where(inside, end, k_end)
  layout = None
  if towers is not None:
    layout = make_layout(
      modality, real, towers=towers, counts=counts, group_rows=group_rows
    )
  return Batch(
    tokens=tokens,
    modality=modality,
    segment=segment,
    position=position,
    k_start=k_start,
    k_end=k_end,
    target=target,
    weight=weight,
    layout=layout,
    latents=latents,
    span=span,
  )


def batch_of_ids(
  documents: Sequence[Sequence[int]],
  vocabulary: Vocabulary,
  *,
  towers: Sequence[int],
  row_length: int = 0,
  counts: Sequence[int] | None = None,
  latents: Sequence[Float[np.ndarray, "_ C"]] | None = None,
  causal: bool = True,
) -> Batch:
  """Makes a batch of one document per row, for use as a library.

  Args:
    documents: ids of the shared vocabulary, modalities interleaved at will.
    vocabulary: tells each id's modality.
    towers: tower of each modality, `model.config.routed_towers.of_modality`.
    row_length: L; 0 takes the longest document's length.
    counts: places of each tower over all rows, summing to rows · L; the default
      fits these documents alone. A compiled step serves all batches of the
      same row length and counts.
    latents: per document the values of its continuous positions, in order;
      needed where the vocabulary has any.
    causal: whether continuous spans are causal, see `packed_batch`.

  Returns:
    A numpy batch `[len(documents), L]`, padded at the end of the rows; each
    target is the next id of its document.

  Raises:
    UserError: no document, an empty or too long one, an id that the
      vocabulary does not have, counts that the documents do not fit, or latents
      of another number or width than their positions.
  """
  lengths = [len(ids) for ids in documents]
  length = row_length or max(lengths, default=0)
  if not lengths or min(lengths) == 0 or max(lengths) > length:
    raise UserError(
      f"batch_of_ids got documents of {lengths} ids for rows of {length}; each"
      f" needs 1 to {length} ids"
    )
  tokens = np.zeros((len(lengths), length), np.int32)
  for row, ids in enumerate(documents):
    tokens[row, : len(ids)] = ids
  if tokens.min() < 0 or tokens.max() >= vocabulary.size:
    raise UserError(
      f"batch_of_ids got ids from {tokens.min()} to {tokens.max()}; the"
      f" vocabulary has 0 to {vocabulary.size - 1}"
    )
  column = np.arange(length, dtype=np.int32)
  real = column < np.asarray(lengths)[:, None]
  if max(towers) > 0 and counts is None:
    tower = np.asarray(towers)[vocabulary.modality_of(tokens)]
    used = [int(((tower == k) & real).sum()) for k in range(max(towers) + 1)]
    counts = [real.size - sum(used[1:]), *used[1:]]
  return packed_batch(
    tokens,
    real.astype(np.int32),
    np.where(real, column, 0).astype(np.int32),
    vocabulary,
    towers=towers if max(towers) > 0 else None,
    counts=counts or (),
    group_rows=len(lengths),
    latents=_placed(tokens, real, latents, vocabulary),
    causal=causal,
  )


def _placed(
  tokens: Int[np.ndarray, "B L"],
  real: Bool[np.ndarray, "B L"],
  latents: Sequence[Float[np.ndarray, "_ C"]] | None,
  vocabulary: Vocabulary,
) -> Float[np.ndarray, "B L C"] | None:
  """Puts each document's latents where its continuous positions are."""
  width = vocabulary.latent_dim
  if not width and not latents:
    return None
  inside = real & np.isin(vocabulary.modality_of(tokens), vocabulary.continuous)
  given = [np.shape(x) for x in latents or ()]
  needed = [(int(n), width) for n in inside.sum(axis=1)]
  if given != needed:
    raise UserError(
      f"batch_of_ids got latents of shapes {given}; its documents need {needed}"
    )
  placed = np.zeros((*tokens.shape, width), np.float32)
  placed[inside] = np.concatenate([np.asarray(x) for x in latents or ()])
  return placed
