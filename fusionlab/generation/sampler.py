"""Continues rows of ids: prompts in, ids out, everything between compiled once.

A row's state is its ids and how many there are. Keys and values of all but the last
of them are in the cache; the last one is run by the next step. So a row is cut
back by a smaller length, copied by copying, and no step is special.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError
from fusionlab.generation.blocks import Blocks
from fusionlab.generation.config import Sampling
from fusionlab.generation.sampling import (
  draw,
  guide,
  numbers,
  penalise,
  structure,
)
from fusionlab.routing import make_layout
from fusionlab.sharding.rules import replicated_beside

RUNNING, EOS, STOP, FULL = range(4)
FINISH = ("running", "eos", "stop", "length")
_SMALLEST_PREFILL = 16


@flax.struct.dataclass
class State:
  """Rows on their way. Arrays of `B` rows, at most `S` ids each.

  Attributes:
    tokens: ids, prompt first; 0 behind them.
    length: how many ids.
    prompt: how many of them were the prompt.
    limit: ids at which a row is full, at most S.
    finished: `RUNNING`, or an index of `FINISH`.
    keys: random stream of each row.
    cache: the model's, of B rows; with guidance of 2B, the second half those of
      the current block in a document without caption.
  """

  tokens: Int[Array, "B S"]
  length: Int[Array, " B"]
  prompt: Int[Array, " B"]
  limit: Int[Array, " B"]
  finished: Int[Array, " B"]
  keys: Key[Array, " B"]
  cache: Any


# (logits [B, V] of the next id, state) -> logits; pure, compiled into the step.
Processor = Callable[[Float[Array, "B V"], State], Float[Array, "B V"]]


def fork(state: State, rows: Int[np.ndarray, " b"]) -> State:
  """Copies rows: `[0, 0, 2]` goes on twice from row 0 and once from row 2.

  Give the copies other `keys` where they are to differ.

  Args:
    state: of B rows.
    rows: indices into them.
  """
  count = state.tokens.shape[0]
  held = jax.tree.leaves(state.cache)[0].shape[0]
  both = np.concatenate([rows + i * count for i in range(held // count)])
  cache = jax.tree.map(lambda leaf: leaf[both], state.cache)
  rest = dataclasses.replace(state, cache=None)
  rest = jax.tree.map(lambda leaf: leaf[rows], rest)
  return dataclasses.replace(rest, cache=cache)


def rollback(state: State, n: Int[Array, " B"]) -> State:
  """Takes the last n ids of each row away; finished rows run again where n > 0.

  What follows is what would have followed had they never been: the cache is not
  looked at beyond a row's length, and the randomness belongs to positions.

  Args:
    state: rows.
    n: at least 0, and less than the row's length.
  """
  length = state.length - n
  column = jnp.arange(state.tokens.shape[1])
  return dataclasses.replace(
    state,
    tokens=jnp.where(column < length[:, None], state.tokens, 0),
    length=length,
    finished=jnp.where(n > 0, RUNNING, state.finished),
  )


@dataclasses.dataclass(frozen=True)
class _Program:
  """What a compiled loop depends on besides shapes."""

  model: Any
  blocks: Blocks
  sampling: Sampling
  may_open: tuple[int, ...]
  stop_ids: tuple[int, ...]
  min_new: int
  processors: tuple[Processor, ...]


class Sampler:
  """Continues rows of one model with one way of choosing ids."""

  def __init__(
    self,
    model: Any,
    params: Any,
    blocks: Blocks,
    *,
    sampling: Sampling,
    may_open: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    min_new: int = 0,
    processors: Sequence[Processor] = (),
  ):
    """Prepares the parameters; compiles nothing.

    Args:
      model: has `step`, `init_cache` and `decoding_params`.
      params: the model's parameters.
      blocks: which ids may follow.
      sampling: how the next one is drawn.
      may_open: modalities of which text may open a block.
      stop_ids: ids that end a row, besides `<eos>`; they stay in it.
      min_new: ids that a row gets before `<eos>` may follow.
      processors: change the logits before the rules of `blocks`.
    """
    self._params = _prepared(model, params)
    self._values = numbers(sampling)
    self._program = _Program(
      model,
      blocks,
      structure(sampling),
      tuple(may_open),
      tuple(stop_ids),
      min_new,
      tuple(processors),
    )

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    keys: Key[Array, " B"],
    *,
    max_new: int,
    length: int,
  ) -> State:
    """Runs the prompts, each a row, in one padded step.

    Args:
      prompts: ids, `<bos>` first.
      keys: random stream of each row.
      max_new: ids that a row may get.
      length: S; rows end there.

    Raises:
      UserError: an empty prompt, one that leaves no place, a broken block, or an
        open block that has no room for its codes.
    """
    program = self._program
    blocks, count = program.blocks, len(prompts)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    limit = np.minimum(lengths + max_new, length).astype(np.int32)
    if not count or lengths.min() < 1 or lengths.max() >= length:
      raise UserError(
        f"prompts of {lengths.tolist()} tokens (with <bos>); each needs 1 to"
        f" {length - 1}, so that rows of {length} have a place for the next one"
      )
    tokens = np.zeros((count, length), np.int32)
    for row, ids in enumerate(prompts):
      blocks.check(ids)
      tokens[row, : len(ids)] = ids
    opened, inside = jax.device_get(
      blocks.where(jnp.asarray(tokens), jnp.asarray(lengths))
    )
    missing = np.asarray(blocks.lengths)[opened] + 2 - inside
    short = (opened > 0) & (lengths + missing > limit)
    if short.any():
      row = int(short.argmax())
      raise UserError(
        f"prompt {row} ends inside of a block that needs {missing[row]} more ids;"
        f" max_new_tokens={max_new} and rows of {length} leave"
        f" {limit[row] - lengths[row]}"
      )
    bare = count if program.sampling.guided else 0
    cache = program.model.init_cache(count + bare, length)
    fed = [list(ids[:-1]) for ids in prompts]
    # A document without caption begins with <bos> too; what stands in its block
    # so far is that of the prompt.
    fed += [
      [blocks.vocabulary.bos, *ids[len(ids) - n : -1]]
      if n
      else [blocks.vocabulary.bos]
      for ids, n in zip(prompts[:bare], inside[:bare], strict=True)
    ]
    if max(map(len, fed)):
      cache = self._prefill(fed, cache)
    state = State(
      tokens=jnp.asarray(tokens),
      length=jnp.asarray(lengths),
      prompt=jnp.asarray(lengths),
      limit=jnp.asarray(limit),
      finished=jnp.zeros(count, jnp.int32),
      keys=keys,
      cache=cache,
    )
    # Where the parameters are, as later states will be: else the first call of
    # `advance` would be compiled apart.
    return jax.device_put(state, replicated_beside(self._params))

  def advance(self, state: State, steps: int) -> State:
    """Gives every running row up to `steps` ids; `state` is used up.

    Args:
      state: of `begin`, `advance`, `fork` or `rollback`.
      steps: at least 1.
    """
    return _advance(
      self._program, self._params, self._values, state, jnp.int32(steps)
    )

  def _prefill(self, rows: Sequence[Sequence[int]], cache: Any) -> Any:
    """Keys and values of prompts, each tower on its own tokens.

    Lengths and the towers' counts are rounded up, so that few programs serve all
    prompts.
    """
    model = self._program.model
    towers = model.config.routed_towers
    lengths = np.array([len(ids) for ids in rows], np.int32)
    width = max(_SMALLEST_PREFILL, 1 << int(lengths.max() - 1).bit_length())
    layout = None
    while True:
      tokens = np.zeros((len(rows), width), np.int32)
      for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
      real = np.arange(width) < lengths[:, None]
      if towers.count == 1:
        break
      modality = np.where(real, model.vocabulary.modality_of(tokens), 0)
      tower = np.asarray(towers.of_modality)[modality]
      used = np.array(
        [(real & (tower == k)).sum() for k in range(towers.count)]
      )
      unit = tokens.size // 8
      counts = -(-used // unit) * unit
      counts[0] = tokens.size - counts[1:].sum()
      if counts[0] >= used[0]:
        layout = make_layout(
          modality,
          real,
          towers=towers.of_modality,
          counts=counts.tolist(),
          group_rows=len(rows),
        )
        break
      width *= 2
    return _prefill(model, self._params, tokens, cache, lengths, layout)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(model: Any, params: Any) -> Any:
  return model.decoding_params(params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(model, params, tokens, cache, fresh, layout):
  start = jnp.zeros(tokens.shape[0], jnp.int32)
  return model.step(
    params, tokens, cache, start=start, fresh=fresh, layout=layout
  ).cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(program, params, values, state, steps):
  def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
    i, state = carry
    return (i < steps) & (state.finished == RUNNING).any()

  def step(carry: tuple[Array, State]) -> tuple[Array, State]:
    i, state = carry
    return i + 1, _step(program, params, values, state)

  return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _step(
  program: _Program, params: Any, values: dict[str, Array], state: State
) -> State:
  """One id for every running row."""
  blocks, sampling = program.blocks, program.sampling
  tokens, length = state.tokens, state.length
  running = state.finished == RUNNING
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
  column = jnp.arange(tokens.shape[1])
  here = (column == length[:, None]) & running[:, None]
  length = length + running
  ends = (chosen[:, None] == jnp.asarray(program.stop_ids, jnp.int32)).any(1)
  finished = jnp.select(
    [chosen == blocks.vocabulary.eos, ends, length >= state.limit],
    [EOS, STOP, FULL],
    RUNNING,
  )
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
