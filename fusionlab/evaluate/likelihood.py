"""Log-probabilities of documents of any lengths, in a few compiled programs.

A document stands in a row of its own. Its row has, for each tower, places for
the document's tokens rounded up (16, 24, 32, 48, 64, …), so that rows of one
shape make batches of one shape whatever else is scored: a picture with its
caption is 16 or 24 places of text and 64 of codes. Short rows keep attention
short: on two cores that is as quick as, or quicker than, rows of 512 packed
with several documents.

The patches of a continuous picture have no log-probability; minus their denoising
error stands for it (`fusionlab.evaluate.denoising`).
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from fusionlab.batch import Batch, packed_batch
from fusionlab.errors import UserError
from fusionlab.evaluate.denoising import patch_errors
from fusionlab.sharding import batches, rules

Span = tuple[int, int]
Latents = Float[np.ndarray, "n c"]
_NO_LATENTS = np.zeros((0, 0), np.float32)
# A batch on its way: the documents of its rows, and the results to come.
_Sent = tuple[list[int], tuple[jax.Array, jax.Array]]

# Logits that exist at one time, and the fewest positions of a matmul.
_LOGITS, _POSITIONS = 2**22, 256
# Batches whose results may still be on their way when the next one is sent.
_IN_FLIGHT = 2


class Shape(NamedTuple):
  """What documents of one batch have in common.

  Attributes:
    places: of each tower in a row; a row's length is their sum.
    targets: positions of a row that are scored.
    patches: whether they are of a continuous picture.
  """

  places: tuple[int, ...]
  targets: int
  patches: bool


class Scores(NamedTuple):
  """What `Scorer.score` returns, one entry a continuation.

  Attributes:
    log_probability: float64, nats, the sum over the continuation.
    greedy: whether each of its tokens is the likeliest one (ties count).
  """

  log_probability: Float[np.ndarray, " n"]
  greedy: Bool[np.ndarray, " n"]


class Scorer:
  """Scores documents with one model; keeps what was compiled for it.

  Documents never see each other, and what a document gets does not depend on
  the others beyond float32 rounding.
  """

  def __init__(
    self,
    model: Any,
    params: Any,
    *,
    objective: Any = None,
    mesh: Mesh | None = None,
    batch_tokens: int = 8192,
  ):
    """Prepares to score; compiles nothing yet.

    Args:
      model: a `fusionlab.models` model, with towers or without.
      params: its parameters.
      objective: of a model of continuous pictures, says at which noise levels
        they are scored; for text alone, after pictures too, it is not needed.
      mesh: splits rows over its data shards; with several processes each passes
        the same documents. None scores on the parameters' device.
      batch_tokens: places of a batch at most, on each data shard; a longer
        document makes a batch alone.
    """
    self.model = model
    self.vocabulary = model.vocabulary
    self._towers = model.config.routed_towers.of_modality
    self._objective = objective
    self._mesh = mesh
    self._shards = 1 if mesh is None else rules.data_shards(mesh)
    self._batch_tokens = batch_tokens
    options: dict[str, Any] = {}
    if mesh is not None:
      params = jax.device_put(
        params, rules.param_shardings(model.param_axes(), params, mesh)
      )
      options["out_shardings"] = rules.replicated(mesh)
    self._params = params
    compiled = functools.partial(jax.jit, static_argnames="targets", **options)
    self._step: Callable[..., tuple[jax.Array, jax.Array]] = compiled(
      functools.partial(_score_batch, model, mesh)
    )
    self._denoise: Callable[..., tuple[jax.Array, jax.Array]] = compiled(
      functools.partial(_denoise_batch, objective, model, mesh)
    )

  def log_probabilities(
    self,
    documents: Sequence[Sequence[int]],
    spans: Sequence[Span] | None = None,
    *,
    latents: Sequence[Latents] | None = None,
  ) -> list[Float[np.ndarray, " _"]]:
    """Scores every token of every document given those before it, in nats.

    Where a span is of patches of a continuous picture, each of them gets minus its
    denoising error: their sums are to be compared with one another, not with nats.

    Args:
      documents: ids of the shared vocabulary, modalities interleaved at will.
      spans: per document (start, stop), the tokens that are wanted; `start` is
        at least 1, as the first token is given. Default (1, all). Only these
        positions' logits are computed. A span is of ids or of patches, not of
        both.
      latents: per document float32, the values of its patches, in order; needed
        where there are any.

    Returns:
      Per document float32 [stop - start]. A long document's logits never exist
      at once.

    Raises:
      UserError: an empty document, an id that the vocabulary does not have, a
        span that is not inside its document or of ids and patches, other latents
        than the document has patches, or patches to score and no objective.
    """
    found: list[Any] = [None] * len(documents)
    for index, (values, _) in self._scored(documents, spans, latents):
      found[index] = values
    return found

  def score(
    self,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
  ) -> Scores:
    """Scores each continuation after its prompt.

    Args:
      prompts: ids, at least one each (`<bos>`).
      continuations: ids, as many lists as prompts.

    Raises:
      UserError: lists of different lengths, or see `log_probabilities`.
    """
    if len(prompts) != len(continuations):
      raise UserError(
        f"score got {len(prompts)} prompts and {len(continuations)}"
        f" continuations; give one continuation for each prompt"
      )
    pairs = list(zip(prompts, continuations, strict=True))
    total = np.zeros(len(pairs))
    greedy = np.zeros(len(pairs), bool)
    scored = self._scored(
      [[*prompt, *continuation] for prompt, continuation in pairs],
      [(len(p), len(p) + len(c)) for p, c in pairs],
    )
    for index, (values, best) in scored:
      total[index] = values.sum(dtype=np.float64)
      greedy[index] = best.all()
    return Scores(total, greedy)

  def _scored(
    self,
    documents: Sequence[Sequence[int]],
    spans: Sequence[Span] | None,
    latents: Sequence[Latents] | None = None,
  ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """(document, (log-probabilities, greedy)) in any order."""
    arrays = [np.asarray(ids, np.int32) for ids in documents]
    if spans is None:
      spans = [(1, len(ids)) for ids in arrays]
    if latents is None:
      latents = [_NO_LATENTS] * len(arrays)
    self._check(arrays, spans, latents)
    alike: dict[Shape, list[int]] = collections.defaultdict(list)
    for index, (ids, span) in enumerate(zip(arrays, spans, strict=True)):
      alike[self._shape(ids, span)].append(index)
    pending: collections.deque[_Sent] = collections.deque()
    for shape, members in alike.items():
      most = max(1, self._batch_tokens // sum(shape.places))
      # Powers of two, so that calls of different sizes meet the same programs.
      rows = min(
        1 << (most.bit_length() - 1),
        _power_of_two(-(-len(members) // self._shards)),
      )
      size = rows * self._shards
      for start in range(0, len(members), size):
        chosen = members[start : start + size]
        batch = self._batch(
          [arrays[i] for i in chosen], [latents[i] for i in chosen], shape, rows
        )
        first = np.zeros(size, np.int32)
        first[: len(chosen)] = [spans[i][0] - 1 for i in chosen]
        run = self._denoise if shape.patches else self._step
        results = run(self._params, batch, first, targets=shape.targets)
        pending.append((chosen, results))
        if len(pending) > _IN_FLIGHT:
          yield from _taken(pending.popleft(), spans)
    while pending:
      yield from _taken(pending.popleft(), spans)

  def _check(
    self,
    documents: Sequence[np.ndarray],
    spans: Sequence[Span],
    latents: Sequence[Latents],
  ) -> None:
    for given, what, each in (
      (spans, "spans", "one (start, stop)"),
      (latents, "latents", "one array"),
    ):
      if len(given) != len(documents):
        raise UserError(
          f"log_probabilities got {len(documents)} documents and {len(given)}"
          f" {what}; give {each} for each document"
        )
    size, width = self.vocabulary.size, self.vocabulary.latent_dim
    for n, (ids, (start, stop), values) in enumerate(
      zip(documents, spans, latents, strict=True)
    ):
      if ids.ndim != 1 or not 1 <= start <= stop <= len(ids):
        raise UserError(
          f"document {n} of shape {ids.shape} cannot be scored from token"
          f" {start} to {stop}; a document is a list of ids, and of its tokens"
          f" all but the first can be scored"
        )
      if ids.min() < 0 or ids.max() >= size:
        raise UserError(
          f"document {n} has ids from {ids.min()} to {ids.max()}; the"
          f" vocabulary has 0 to {size - 1}"
        )
      patch = self._patches(ids)
      if len(values) != patch.sum() or (
        len(values) and values.shape[1] != width
      ):
        raise UserError(
          f"document {n} has {patch.sum()} patches of {width} values, and latents"
          f" of shape {values.shape}; give the values of each patch"
        )
      scored = patch[start:stop]
      if scored.any() and not scored.all():
        raise UserError(
          f"document {n}: {scored.sum()} of the tokens {start} to {stop} are"
          f" patches and the others ids; nats and denoising errors do not add up,"
          f" score them one after the other"
        )
      if scored.any() and self._objective is None:
        raise UserError(
          f"document {n}: the tokens {start} to {stop} are patches, whose score"
          f" depends on noise levels; give Scorer the objective"
        )

  def _patches(self, ids: np.ndarray) -> Bool[np.ndarray, " _"]:
    """Which ids stand for patches."""
    return np.isin(self.vocabulary.modality_of(ids), self.vocabulary.continuous)

  def _shape(self, ids: np.ndarray, span: Span) -> Shape:
    tower = np.asarray(self._towers)[self.vocabulary.modality_of(ids)]
    used = np.bincount(tower, minlength=max(self._towers) + 1)
    places = tuple(_rounded(int(n)) for n in used)
    targets = max(16, _power_of_two(span[1] - span[0]))
    patches = bool(self._patches(ids[slice(*span)]).any())
    return Shape(places, min(targets, sum(places)), patches)

  def _batch(
    self,
    documents: Sequence[np.ndarray],
    latents: Sequence[Latents],
    shape: Shape,
    rows: int,
  ) -> Batch:
    """A document per row; rows that are left over are padding."""
    tokens = np.zeros((rows * self._shards, sum(shape.places)), np.int32)
    segment, position = np.zeros_like(tokens), np.zeros_like(tokens)
    width = self.vocabulary.latent_dim
    placed = np.zeros((*tokens.shape, width), np.float32) if width else None
    for row, (ids, values) in enumerate(zip(documents, latents, strict=True)):
      if placed is not None and len(values):
        placed[row, np.flatnonzero(self._patches(ids))] = values
      tokens[row, : len(ids)] = ids
      segment[row, : len(ids)] = 1
      position[row, : len(ids)] = np.arange(len(ids))
    batch = packed_batch(
      tokens,
      segment,
      position,
      self.vocabulary,
      towers=self._towers if max(self._towers) > 0 else None,
      counts=[rows * n for n in shape.places],
      group_rows=rows,
      latents=placed,
      causal=self.model.config.causal,
    )
    if self._mesh is None:
      return batch
    return jax.device_put(batch, batches.batch_shardings(batch, self._mesh))


def _score_batch(
  model: Any,
  mesh: Mesh | None,
  params: Any,
  batch: Batch,
  first: jax.Array,
  *,
  targets: int,
) -> tuple[jax.Array, jax.Array]:
  """Scores each row's targets from `first` on: log p and whether greedy."""
  with contextlib.nullcontext() if mesh is None else rules.in_mesh(mesh):
    hidden = model.apply({"params": params}, batch)
    at = first[:, None] + jnp.arange(targets)
    at = jnp.minimum(at, batch.tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    target = jnp.take_along_axis(jnp.asarray(batch.target), at, axis=1)

    def of_column(column: tuple[jax.Array, jax.Array]):
      states, ids = column
      logits = model.logits(params, states)
      for i in model.vocabulary.placeholders:
        logits = logits.at[:, i].set(-1e30)
      top = logits.max(-1)
      log_z = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
      chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
      # As argmax == target, which XLA's CPU backend does 5x slower than max.
      return chosen - log_z, chosen >= top

    # By positions, not by rows: rows stay whole for sharding.
    positions = max(_POSITIONS, _LOGITS // model.vocab_size)
    columns = max(1, positions // len(first))
    values, greedy = jax.lax.map(
      of_column, (hidden.swapaxes(0, 1), target.T), batch_size=columns
    )
    return values.T, greedy.T


def _denoise_batch(
  objective: Any,
  model: Any,
  mesh: Mesh | None,
  params: Any,
  batch: Batch,
  first: jax.Array,
  *,
  targets: int,
) -> tuple[jax.Array, jax.Array]:
  """Scores each row's patches behind `first`: minus error, and never greedy."""
  with contextlib.nullcontext() if mesh is None else rules.in_mesh(mesh):
    at = first[:, None] + 1 + jnp.arange(targets)
    at = jnp.minimum(at, batch.tokens.shape[1] - 1)
    errors = patch_errors(objective, model, params, batch, at[:, 0])
    values = -jnp.take_along_axis(errors, at, axis=1)
    return values, jnp.zeros(values.shape, bool)


def _taken(
  sent: _Sent, spans: Sequence[Span]
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
  """Waits for a batch; per document its log-probabilities and greediness."""
  chosen, results = sent
  values, greedy = jax.device_get(results)
  for row, index in enumerate(chosen):
    number = spans[index][1] - spans[index][0]
    yield index, (values[row, :number], greedy[row, :number])


def _power_of_two(number: int) -> int:
  """The smallest power of two that is not less."""
  return 1 << max(number - 1, 0).bit_length()


def _rounded(number: int) -> int:
  """0, or the smallest of 16, 24, 32, 48, 64, 96, … that is not less."""
  if number == 0:
    return 0
  size = max(16, _power_of_two(number))
  return size * 3 // 4 if size > 16 and number <= size * 3 // 4 else size
