"""`fusionlab.generate`: prompts in, texts and pictures out."""

import dataclasses
import functools
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
from fusionlab.generation.denoising import Hook
from fusionlab.generation.program import Processor
from fusionlab.generation.prompts import Encoded, Prompt
from fusionlab.generation.rows import FINISH, RUNNING, STOP, State
from fusionlab.generation.sampler import Sampler
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
    latents: values of the document's patches, float32 [patches, C], in order;
      None for a model without continuous pictures.
    snapshots: for each of `pictures` what the sampler took it for at some of its
      steps, uint8 [K, S, S, 3]; empty where none were asked for.
  """

  prompt: int
  sample: int
  ids: tuple[int, ...]
  parts: tuple[str | np.ndarray, ...]
  finish: str
  latents: np.ndarray | None = None
  snapshots: tuple[np.ndarray, ...] = ()

  @property
  def text(self) -> str:
    """The generated texts, joined."""
    return "".join(part for part in self.parts if isinstance(part, str))

  @property
  def pictures(self) -> list[np.ndarray]:
    """The generated pictures."""
    return _pictures(self.parts)


def generate(
  model: Any,
  params: Any,
  tokenizers: Tokenizers,
  prompts: Prompt | Encoded | Sequence[Prompt | Encoded | Sequence[int]],
  *,
  make: str = "auto",
  num_samples: int = 1,
  max_new_tokens: int = MAX_NEW_TOKENS,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  seed: int = 0,
  rows: int = 64,
  processors: Sequence[Processor] = (),
  snapshots: int = 0,
  denoise_hook: Hook | None = None,
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
      sequence of them (see `prompts.encode`), a list of ids, or, where a
      picture in it is continuous, a `prompts.Encoded`.
    make: "auto" lets the model choose between text and pictures, "text" writes at
      least one id of text and no picture, "image" makes one picture and ends.
    num_samples: continuations of each prompt.
    max_new_tokens: ids that a continuation may get; rows end at the length the
      model was trained on.
    stop: strings that end a continuation, and are not part of it.
    stop_ids: ids that do.
    seed: root of the random streams.
    rows: continuations that run at a time.
    processors: pure functions (logits, state) -> logits, see `program.Processor`;
      the same function object compiles once.
    snapshots: pictures from on the way to each continuous picture, K.
    denoise_hook: pure, changes what blocks' attention returns on that way, see
      `denoising.Hook`; the same function object compiles once.
    on_progress: called with (continuations ended, all) now and then.
    **sampling: fields of `Sampling`: temperature, top_k, top_p, min_p,
      repetition_penalty, guidance; of continuous pictures diffusion_steps,
      sampler, eta, clip_latents.

  Returns:
    `num_samples` continuations of the first prompt, then of the second, …

  Raises:
    UserError: an unknown setting or one out of range or one that does not go with
      the model, a prompt that is too long or no prompt, a picture that cannot be
      read.
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
  encoded = [_encoded(p, tokenizers) for p in _listed(prompts)]
  starts = [e.ids for e in encoded]
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
    snapshots=snapshots,
    denoise_hook=denoise_hook,
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
      [starts[p] for p, _ in here],
      keys,
      max_new=max_new_tokens,
      length=length,
      latents=[encoded[p].latents for p, _ in here],
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
    show = functools.partial(
      documents.decode,
      kept,
      tokenizers,
      starts=[shown_from[p] for p, _ in here],
    )
    shown = show(latents=[row.latents for row in written])
    before = [
      show(latents=[row.snapshots[k] for row in written])
      for k in range(snapshots)
    ]
    for i, ((p, s), row) in enumerate(zip(here, written, strict=True)):
      parts = shown[i]
      stages = [_pictures(stage[i]) for stage in before]
      if row.cut:
        parts[-1] = _before(str(parts[-1]), stop)
      done.append(
        Generated(
          p,
          s,
          tuple(kept[i]),
          tuple(parts),
          row.finish,
          row.latents if vocabulary.continuous else None,
          tuple(np.stack(each) for each in zip(*stages, strict=True)),
        )
      )
  return done


def _pictures(parts: Sequence[str | np.ndarray]) -> list[np.ndarray]:
  return [part for part in parts if not isinstance(part, str)]


def _listed(prompts: Any) -> list[Any]:
  if isinstance(prompts, (*documents.PARTS, Encoded)):
    return [prompts]
  listed = list(prompts)
  if not listed:
    raise UserError("no prompt was given")
  return listed


def _encoded(prompt: Any, tokenizers: Tokenizers) -> Encoded:
  if isinstance(prompt, Encoded):
    return prompt
  if not isinstance(prompt, documents.PARTS) and all(
    isinstance(part, int | np.integer) for part in prompt
  ):
    return Encoded([int(i) for i in prompt])
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
  """A finished row.

  Attributes:
    ids: of the whole row.
    finish: see `Generated`.
    cut: whether a stop string ended it.
    latents: [p, C] of its p patches, none where pictures are codes.
    snapshots: [K, p, C], likewise.
  """

  ids: list[int]
  finish: str
  cut: bool
  latents: np.ndarray
  snapshots: np.ndarray


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
  latents, snapshots = jax.device_get((state.latents, state.snapshots))
  if latents is None:
    latents = np.zeros((*tokens.shape, 0), np.float32)
    snapshots = latents[:, None]
  rows = []
  for row, reason in enumerate(finished):
    ids = tokens[row, : cut.get(row, lengths[row])]
    modality = tokenizers.vocabulary.modality_of(ids)
    (patches,) = np.nonzero(np.isin(modality, tokenizers.vocabulary.continuous))
    rows.append(
      _Row(
        ids.tolist(),
        FINISH[reason],
        row in cut,
        latents[row, patches],
        snapshots[row][:, patches],
      )
    )
  return rows


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
