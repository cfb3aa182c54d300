"""`fusionlab.generate`: prompts in, texts and pictures out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.config import from_mapping
from fusionlab.errors import UserError, nearest
from fusionlab.generation import prompts as documents
from fusionlab.generation.blocks import Blocks
from fusionlab.generation.config import MAX_NEW_TOKENS, Sampling
from fusionlab.generation.prompts import Prompt
from fusionlab.generation.sampler import (
  FINISH,
  RUNNING,
  STOP,
  Processor,
  Sampler,
  State,
)
from fusionlab.tokenizers import Tokenizers

# Ids between two looks at the rows: for stop strings and the progress bar.
_LOOK_EVERY = 32
_LENGTHS = 64  # rows' lengths are multiples of this: fewer programs


@dataclasses.dataclass(frozen=True)
class Generated:
  """One continuation.

  Attributes:
    prompt: index of its prompt.
    sample: index among that prompt's samples.
    ids: of the whole document, prompt first; without what ended it.
    parts: what was generated: texts, and pictures uint8 [S, S, 3], in order.
    finish: "eos", "stop" (a stop id or string, or the picture asked for is
      whole) or "length".
  """

  prompt: int
  sample: int
  ids: tuple[int, ...]
  parts: tuple[str | np.ndarray, ...]
  finish: str

  @property
  def text(self) -> str:
    """The generated texts, joined."""
    return "".join(part for part in self.parts if isinstance(part, str))

  @property
  def pictures(self) -> list[np.ndarray]:
    """The generated pictures."""
    return [part for part in self.parts if not isinstance(part, str)]


def generate(
  model: Any,
  params: Any,
  tokenizers: Tokenizers,
  prompts: Prompt | Sequence[Prompt | Sequence[int]],
  *,
  make: str = "auto",
  num_samples: int = 1,
  max_new_tokens: int = MAX_NEW_TOKENS,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  seed: int = 0,
  rows: int = 64,
  processors: Sequence[Processor] = (),
  on_progress: Callable[[int, int], None] | None = None,
  **sampling: Any,
) -> list[Generated]:
  """Continues prompts with text and pictures.

  A continuation depends on its prompt, the seed and its sample number, not on the
  other prompts (up to float rounding of another batch size).

  Args:
    model: as `fusionlab.load` returns it, like the next two.
    params: its parameters.
    tokenizers: its tokenizers.
    prompts: one text or picture, or several prompts, each a text, a picture, a
      sequence of them (see `prompts.encode`), or a list of ids.
    make: "auto" lets the model choose between text and pictures, "text" writes at
      least one id of text and no picture, "image" makes one picture and ends.
    num_samples: continuations of each prompt.
    max_new_tokens: ids that a continuation may get; rows end at the length the
      model was trained on.
    stop: strings that end a continuation, and are not part of it.
    stop_ids: ids that do.
    seed: root of the random streams.
    rows: continuations that run at a time.
    processors: pure functions (logits, state) -> logits, see `sampler.Processor`;
      the same function object compiles once.
    on_progress: called with (continuations ended, all) now and then.
    **sampling: fields of `Sampling`: temperature, top_k, top_p, min_p,
      repetition_penalty, guidance.

  Returns:
    `num_samples` continuations of the first prompt, then of the second, …

  Raises:
    UserError: an unknown setting or one out of range, a prompt that is too long
      or no prompt, a picture that cannot be read.
  """
  settings = from_mapping(Sampling, sampling, "sampling")
  vocabulary = tokenizers.vocabulary
  choices = ("auto", *vocabulary.modalities)
  if make == "image" and make not in choices:
    tokenizers.pictures("make='image'")
  if make not in choices:
    raise UserError(f"unknown make={make!r}{nearest(make, choices)}")
  for name, value in (
    ("num_samples", num_samples),
    ("max_new_tokens", max_new_tokens),
    ("rows", rows),
  ):
    if value < 1:
      raise UserError(f"{name}={value} must be at least 1")
  blocks = Blocks(vocabulary, tokenizers.block_lengths)
  asked = 0 if make == "auto" else vocabulary.index(make)
  starts = [_ids(p, tokenizers) for p in _listed(prompts)]
  shown_from = [len(ids) for ids in starts]
  may_open: tuple[int, ...] = ()
  if make == vocabulary.modalities[0]:
    settings = dataclasses.replace(settings, guidance=1.0)  # of pictures only
  if make == "auto":
    may_open = tuple(range(1, len(vocabulary.modalities)))
  if asked:
    starts = [[*ids, vocabulary.begin[asked]] for ids in starts]
    stop_ids = (*stop_ids, vocabulary.end[asked])
    max_new_tokens = blocks.lengths[asked] + 1
  length = _row_length(model, starts, max_new_tokens)
  sampler = Sampler(
    model,
    params,
    blocks,
    sampling=settings,
    may_open=may_open,
    stop_ids=stop_ids,
    min_new=int(make == vocabulary.modalities[0]),
    processors=processors,
  )
  order = [(p, s) for p in range(len(starts)) for s in range(num_samples)]
  root = jax.random.key(seed)
  done: list[Generated] = []
  for first in range(0, len(order), rows):
    here = order[first : first + rows]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      root, np.array([s for _, s in here])
    )
    state = sampler.begin(
      [starts[p] for p, _ in here], keys, max_new=max_new_tokens, length=length
    )
    written = _run(
      sampler,
      state,
      [shown_from[p] for p, _ in here],
      stop,
      tokenizers,
      lambda ended, first=first: (
        on_progress and on_progress(first + ended, len(order))
      ),
    )
    ends = () if asked else (vocabulary.eos, *stop_ids)
    kept = [row.ids[:-1] if row.ids[-1] in ends else row.ids for row in written]
    shown = documents.decode(
      kept, tokenizers, starts=[shown_from[p] for p, _ in here]
    )
    for (p, s), ids, parts, row in zip(here, kept, shown, written, strict=True):
      if row.cut:
        parts[-1] = _before(str(parts[-1]), stop)
      done.append(Generated(p, s, tuple(ids), tuple(parts), row.finish))
  return done


def _listed(prompts: Any) -> list[Any]:
  if isinstance(prompts, documents.PARTS):
    return [prompts]
  listed = list(prompts)
  if not listed:
    raise UserError("no prompt was given")
  return listed


def _ids(prompt: Any, tokenizers: Tokenizers) -> list[int]:
  if not isinstance(prompt, documents.PARTS) and all(
    isinstance(part, int | np.integer) for part in prompt
  ):
    return [int(i) for i in prompt]
  return documents.encode(prompt, tokenizers)


def _row_length(model: Any, starts: list[list[int]], max_new: int) -> int:
  """Places of a row: what is needed, rounded up, within what was trained."""
  longest = max(map(len, starts))
  limit = model.row_length or longest + max_new
  if longest >= limit:
    raise UserError(
      f"prompt {max(range(len(starts)), key=lambda p: len(starts[p]))} has"
      f" {longest} tokens; the model was trained on rows of {limit}, which must"
      f" hold the prompt and what follows: shorten it to {limit - 1} or less"
    )
  return min(-(-(longest + max_new) // _LENGTHS) * _LENGTHS, limit)


class _Row(NamedTuple):
  """A finished row; `cut` where a stop string ended it."""

  ids: list[int]
  finish: str
  cut: bool


def _run(
  sampler: Sampler,
  state: State,
  shown_from: Sequence[int],
  stop: Sequence[str],
  tokenizers: Tokenizers,
  on_ended: Callable[[int], None],
) -> list[_Row]:
  """Runs rows until all have ended, looking at them now and then."""
  cut: dict[int, int] = {}  # row -> ids, where a stop string came
  while True:
    state = sampler.advance(state, _LOOK_EVERY)
    tokens, lengths, finished = jax.device_get(
      (state.tokens, state.length, state.finished)
    )
    finished = np.array(finished)
    for row, start in enumerate(shown_from):
      if stop and row not in cut:
        ids = _first_stop(tokens[row, : lengths[row]], start, stop, tokenizers)
        if ids is not None:
          cut[row], finished[row] = ids, STOP
    if cut:
      state = dataclasses.replace(state, finished=jnp.asarray(finished))
    on_ended(int((finished != RUNNING).sum()))
    if (finished != RUNNING).all():
      break
  return [
    _Row(
      tokens[row, : cut.get(row, lengths[row])].tolist(),
      FINISH[finished[row]],
      row in cut,
    )
    for row in range(len(finished))
  ]


def _first_stop(
  ids: np.ndarray, start: int, stop: Sequence[str], tokenizers: Tokenizers
) -> int | None:
  """How many ids it takes until a stop string stands in a text after `start`."""
  is_text = ids[start:] < tokenizers.vocabulary.ends[0]
  borders = np.flatnonzero(np.diff(is_text, prepend=False, append=False))
  for first, last in (start + borders).reshape(-1, 2):
    continues = documents.continues(ids, int(first), tokenizers.vocabulary)
    text = tokenizers.text.decode(ids[first:last], continues=continues)
    if _before(text, stop) == text:
      continue
    for end in range(first + 1, last + 1):
      text = tokenizers.text.decode(ids[first:end], continues=continues)
      if _before(text, stop) != text:
        return int(end)
  return None


def _before(text: str, stop: Sequence[str]) -> str:
  """The text before its first stop string."""
  found = [at for at in (text.find(s) for s in stop) if at >= 0]
  return text[: min(found)] if found else text
