"""One step of rows: an id each, or the pictures that they wait for.

Pure, and compiled once with the loop around it. A continuous picture is drawn whole:
its first patch follows on its begin as the only id that may, a row then waits there
until all that run do, and the pictures are denoised together, each with its end
behind it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.generation.blocks import Blocks
from fusionlab.generation.config import Sampling
from fusionlab.generation.denoising import Denoiser
from fusionlab.generation.rows import EOS, FULL, RUNNING, STOP, State
from fusionlab.generation.sampling import draw, guide, penalise

# (logits [B, V] of the next id, state) -> logits; pure, compiled into the step.
Processor = Callable[[Float[Array, "B V"], State], Float[Array, "B V"]]


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled loop depends on besides shapes; see `sampler.Sampler`."""

  model: Any
  blocks: Blocks
  sampling: Sampling
  may_open: tuple[int, ...]
  stop_ids: tuple[int, ...]
  min_new: int
  processors: tuple[Processor, ...]
  denoiser: Denoiser | None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(
  program: Program,
  params: Any,
  values: dict[str, Array],
  state: State,
  steps: Int[Array, ""],
) -> State:
  """Takes up to `steps` steps with every running row.

  Args:
    program: static.
    params: of `decoding_params`.
    values: of `sampling.numbers`.
    state: is used up.
    steps: at least 1.
  """

  def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
    i, state = carry
    return (i < steps) & (state.finished == RUNNING).any()

  def step(carry: tuple[Array, State]) -> tuple[Array, State]:
    i, state = carry
    write = functools.partial(_step, program, params, values)
    if program.denoiser is None:
      return i + 1, write(state)
    draw_pictures = functools.partial(_draw_pictures, program, params, values)
    waits = _due(program.blocks, state) | (state.finished != RUNNING)
    return i + 1, jax.lax.cond(waits.all(), draw_pictures, write, state)

  return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _due(blocks: Blocks, state: State) -> Bool[Array, " B"]:
  """Running rows that stand at the patches of a continuous picture."""
  continuous = np.isin(
    np.arange(len(blocks.lengths)), blocks.vocabulary.continuous
  )
  opened, inside = blocks.where(state.tokens, state.length)
  begun = jnp.asarray(continuous)[opened] & (inside > 1)
  return begun & (state.finished == RUNNING)


def _draw_pictures(
  program: Program, params: Any, values: dict[str, Array], state: State
) -> State:
  """A whole picture, and its end, for every row that is due."""
  denoiser: Any = program.denoiser
  old: Any = state
  blocks, vocabulary = program.blocks, program.blocks.vocabulary
  due = _due(blocks, state)
  # Where a row was cut back inside of a picture it holds some patches already.
  _, inside = blocks.where(state.tokens, state.length)
  first = state.length + 1 - inside
  drawn = denoiser(
    params,
    state.cache,
    first=first,
    due=due,
    keys=state.keys,
    guidance=values["guidance"],
  )
  n, modality = denoiser.grid.positions, denoiser.modality
  column = jnp.arange(state.tokens.shape[1])
  patch = column - first[:, None]
  here = due[:, None] & (patch >= 0) & (patch < n)
  patch = jnp.clip(patch, 0, n - 1)[..., None]
  latents = jnp.take_along_axis(drawn.latents, patch, axis=1)
  snapshots = jnp.take_along_axis(drawn.snapshots, patch[:, None], axis=2)
  end = vocabulary.end[modality]
  ends = due[:, None] & (column == first[:, None] + n)
  tokens = jnp.where(here, vocabulary.offset(modality), state.tokens)
  length = jnp.where(due, first + n + 1, state.length)
  chosen = jnp.full_like(length, end)
  finished = _finished(program, state, chosen, length)
  return dataclasses.replace(
    state,
    tokens=jnp.where(ends, end, tokens),
    length=length,
    finished=jnp.where(due, finished, state.finished),
    cache=drawn.cache,
    latents=jnp.where(here[..., None], latents, old.latents),
    snapshots=jnp.where(here[:, None, :, None], snapshots, old.snapshots),
  )


def _finished(
  program: Program,
  state: State,
  chosen: Int[Array, " B"],
  length: Int[Array, " B"],
) -> Int[Array, " B"]:
  """Why rows end that got an id and have a length now, or `RUNNING`."""
  stops = jnp.asarray(program.stop_ids, jnp.int32)
  return jnp.select(
    [
      chosen == program.blocks.vocabulary.eos,
      (chosen[:, None] == stops).any(1),
      length >= state.limit,
    ],
    [EOS, STOP, FULL],
    RUNNING,
  )


def _step(
  program: Program, params: Any, values: dict[str, Array], state: State
) -> State:
  """One id for every running row that does not wait for a picture."""
  blocks, sampling = program.blocks, program.sampling
  tokens, length = state.tokens, state.length
  running = state.finished == RUNNING
  if program.denoiser is not None:
    running &= ~_due(blocks, state)
  opened, inside = blocks.where(tokens, length)
  last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
  start, fresh = length - 1, running.astype(jnp.int32)
  if sampling.guided:
    # <bos>, then the block: its id number n stands at position n.
    last = jnp.concatenate([last, last])
    start = jnp.concatenate([start, inside])
    fresh = jnp.concatenate([fresh, fresh * (opened > 0)])
  decoded = program.model.step(
    params, last, state.cache, start=start, fresh=fresh
  )
  logits = program.model.logits(params, decoded.hidden[:, 0])
  if sampling.guided:
    with_caption, without = jnp.split(logits, 2)
    logits = guide(with_caption, without, opened > 0, values["guidance"])
  if sampling.repetition_penalty != 1:
    occurred = _occurred(tokens, length, blocks.vocabulary, logits)
    logits = penalise(logits, occurred, values["repetition_penalty"])
  if program.min_new:
    soon = length - state.prompt < program.min_new
    eos = jnp.arange(logits.shape[1]) == blocks.vocabulary.eos
    logits = jnp.where(soon[:, None] & eos, -jnp.inf, logits)
  for processor in program.processors:
    logits = processor(logits, state)
  logits = blocks.restrict(
    logits,
    opened,
    inside,
    room=state.limit - length,
    may_open=program.may_open,
  )
  chosen = draw(logits, state.keys, length, sampling, values)
  if program.denoiser is not None:
    # Its score was never trained: behind the begin nothing else may stand.
    patch = blocks.vocabulary.offset(program.denoiser.modality)
    begun = opened == program.denoiser.modality
    chosen = jnp.where(begun, patch, chosen)
  column = jnp.arange(tokens.shape[1])
  here = (column == length[:, None]) & running[:, None]
  length = length + running
  finished = _finished(program, state, chosen, length)
  return dataclasses.replace(
    state,
    tokens=jnp.where(here, chosen[:, None], tokens),
    length=length,
    finished=jnp.where(running, finished, state.finished),
    cache=decoded.cache,
  )


def _occurred(
  tokens: Array, length: Array, vocabulary: Vocabulary, logits: Array
) -> Bool[Array, "B V"]:
  """Ids of text, specials apart, that stand in each row."""
  counted = jnp.arange(tokens.shape[1]) < length[:, None]
  counted &= tokens < vocabulary.ends[0]
  row = jnp.arange(tokens.shape[0])[:, None]
  nothing = jnp.zeros(logits.shape, bool)
  occurred = nothing.at[row, tokens].max(counted)
  return occurred.at[:, jnp.asarray(vocabulary.specials)].set(False)
