"""Continues rows of ids: prompts in, ids out, everything between compiled once."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fusionlab.errors import UserError
from fusionlab.generation.blocks import Blocks
from fusionlab.generation.config import Sampling
from fusionlab.generation.denoising import Hook, make_denoiser
from fusionlab.generation.program import Processor, Program, advance
from fusionlab.generation.rows import State, place_latents
from fusionlab.generation.sampling import numbers, structure
from fusionlab.routing import make_layout
from fusionlab.sharding.rules import replicated_beside

_SMALLEST_PREFILL = 16


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
    snapshots: int = 0,
    denoise_hook: Hook | None = None,
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
      snapshots: K, estimates of each continuous picture that are kept.
      denoise_hook: sees, and may change, what each block's attention returns
        while a continuous picture is drawn; see `denoising.Hook`.

    Raises:
      UserError: settings of continuous pictures that do not go with the model,
        see `make_denoiser`.
    """
    self._params = _prepared(model, params)
    self._values = numbers(sampling)
    self._program = Program(
      model,
      blocks,
      structure(sampling),
      tuple(may_open),
      tuple(stop_ids),
      min_new,
      tuple(processors),
      make_denoiser(model, sampling, snapshots, denoise_hook),
    )

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    keys: Key[Array, " B"],
    *,
    max_new: int,
    length: int,
    latents: Sequence[Float[np.ndarray, "_ C"] | None] | None = None,
  ) -> State:
    """Runs the prompts, each a row, in one padded step.

    Args:
      prompts: ids, `<bos>` first.
      keys: random stream of each row.
      max_new: ids that a row may get.
      length: S; rows end there.
      latents: of each prompt the values of its continuous positions, in order;
        None for one that has none, or where no prompt has any.

    Raises:
      UserError: an empty prompt, one that leaves no place, a broken block, an
        open block that has no room for its codes, a continuous picture that is
        begun and not whole, or latents of another number or width.
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
    values = place_latents(prompts, latents, length, blocks.vocabulary)
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
      cache = self._prefill(fed, cache, values)
    kept = None
    if program.denoiser is not None:
      width = program.denoiser.grid.dim
      kept = jnp.zeros((count, program.denoiser.snapshots, length, width))
    state = State(
      tokens=jnp.asarray(tokens),
      length=jnp.asarray(lengths),
      prompt=jnp.asarray(lengths),
      limit=jnp.asarray(limit),
      finished=jnp.zeros(count, jnp.int32),
      keys=keys,
      cache=cache,
      latents=None if values is None else jnp.asarray(values),
      snapshots=kept,
    )
    # Where the parameters are, as later states will be: else the first call of
    # `advance` would be compiled apart.
    return jax.device_put(state, replicated_beside(self._params))

  def advance(self, state: State, steps: int) -> State:
    """Gives every running row up to `steps` ids; `state` is used up.

    A continuous picture takes one step, which it may have to wait for: until all
    running rows stand where a picture begins.

    Args:
      state: of `begin`, `advance`, `fork` or `rollback`.
      steps: at least 1.
    """
    return advance(
      self._program, self._params, self._values, state, jnp.int32(steps)
    )

  def _prefill(
    self,
    rows: Sequence[Sequence[int]],
    cache: Any,
    values: Float[np.ndarray, "B S C"] | None,
  ) -> Any:
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
    continuous = {}
    if values is not None and values.any():
      # Rows without caption stand behind the others, and hold no whole picture.
      places = min(width, values.shape[1])
      latents = np.zeros((*tokens.shape, values.shape[-1]), np.float32)
      latents[: len(values), :places] = values[:, :places]
      continuous = {"latents": latents}
    return _prefill(
      model, self._params, tokens, cache, lengths, layout, continuous
    )


@functools.partial(jax.jit, static_argnums=0)
def _prepared(model: Any, params: Any) -> Any:
  return model.decoding_params(params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(model, params, tokens, cache, fresh, layout, continuous):
  start = jnp.zeros(tokens.shape[0], jnp.int32)
  return model.step(
    params,
    tokens,
    cache,
    start=start,
    fresh=fresh,
    layout=layout,
    **continuous,
  ).cache
