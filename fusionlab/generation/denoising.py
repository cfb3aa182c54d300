"""Continuous pictures: a diffusion sampler against the cache of what stands before.

Transfusion (arXiv 2408.11039), section 3.3: when text has opened a picture, its
patches are noise, and each step puts less noisy ones in the same places, so that no
step attends to the levels before it. The prefix is run once and stays as it is.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fusionlab.batch import LatentGrid
from fusionlab.errors import UserError
from fusionlab.generation.config import DIFFUSION, Sampling
from fusionlab.generation.sampling import guide
from fusionlab.nn.attention import Attention

# In a document without caption `<bos>` and the block's begin stand before patches.
_BARE_START = 2


class Moment(NamedTuple):
  """Where in the denoising an attention output arises.

  Attributes:
    layer: index of the block, from 0; static.
    step: int32, of the sampler's steps, from 0.
    time: float32, noise level of what the step sees, from 1 (noise) down.
    rows: bool [R], rows whose picture is being drawn; the others are padding.
  """

  layer: int
  step: Int[Array, ""]
  time: Float[Array, ""]
  rows: Bool[Array, " R"]


# (attention output [R, n, d] of a block for the n patches, where) -> what the block
# goes on with; pure, compiled into the step. R is the number of rows, with guidance
# twice that: those without caption are the second half.
Hook = Callable[[Float[Array, "R n d"], Moment], Float[Array, "R n d"]]


class Drawn(NamedTuple):
  """Pictures of the rows that were due; without meaning in the others.

  Attributes:
    latents: clean patches.
    snapshots: estimates of them at `snapshot_steps`.
    cache: with the clean patches' keys and values in it.
  """

  latents: Float[Array, "B n C"]
  snapshots: Float[Array, "B K n C"]
  cache: Any


def snapshot_steps(snapshots: int, steps: int) -> list[int]:
  """Which steps' estimates are kept: evenly spaced, without first and last.

  Args:
    snapshots: how many, less than `steps`.
    steps: of the sampler.
  """
  return [(k + 1) * steps // (snapshots + 1) for k in range(snapshots)]


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """How pictures are drawn; a part of the compiled program.

  Attributes:
    model: has `process`, and `step` with `latents`, `time` and `denoise`.
    steps: N of the sampler.
    sampler: its name.
    eta: of 'ddim'.
    clip: largest |value| of an estimate of the clean latents; None: no bound.
    guided: whether the rows are followed by those without caption.
    snapshots: K, estimates that are kept.
    hook: sees, and may change, attention outputs.
  """

  model: Any
  steps: int
  sampler: str
  eta: float
  clip: float | None
  guided: bool
  snapshots: int = 0
  hook: Hook | None = None

  @property
  def modality(self) -> int:
    """Id of the continuous modality."""
    return self.model.image

  @property
  def grid(self) -> LatentGrid:
    """How its latents lie."""
    return self.model.vocabulary.grid(self.modality)

  def __call__(
    self,
    params: Any,
    cache: Any,
    *,
    first: Int[Array, " B"],
    due: Bool[Array, " B"],
    keys: Key[Array, " B"],
    guidance: Float[Array, ""],
  ) -> Drawn:
    """Draws the pictures of some rows, all of them together.

    Args:
      params: of `decoding_params`.
      cache: of B rows, with guidance 2B; holds each row up to the block's begin.
      first: position of the first patch in each row.
      due: rows that get a picture; nothing of the others is written.
      keys: random stream of each row.
      guidance: weight w, where guided.
    """
    grid, process = self.grid, self.model.process
    n, rows = grid.positions, first.shape[0]
    start, fresh = first, jnp.where(due, n, 0)
    if self.guided:
      start = jnp.concatenate([start, jnp.full_like(start, _BARE_START)])
      fresh = jnp.concatenate([fresh, fresh])
    patch = self.model.vocabulary.offset(self.modality)
    tokens = jnp.full((len(start), n), patch, jnp.int32)
    # One more, from 0 to 0: it changes nothing but the cache, whose last run is
    # of the clean picture.
    times = jnp.asarray([*process.times(self.steps), 0.0])
    kept = np.array(snapshot_steps(self.snapshots, self.steps), np.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, first)
    draws = self.sampler == "ddpm" or self.eta > 0

    def noise(i: Int[Array, ""] | int) -> Float[Array, "B n C"]:
      own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      return jax.vmap(lambda k: jax.random.normal(k, (n, grid.dim)))(own)

    def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
      x, snapshots, cache = carry
      time = times[i]
      seen = jnp.concatenate([x, x]) if self.guided else x
      with self._hooked(i, time, fresh > 0):
        decoded = self.model.step(
          params,
          tokens,
          cache,
          start=start,
          fresh=fresh,
          latents=seen,
          time=jnp.full(tokens.shape, time),
          denoise=True,
        )
      prediction = decoded.prediction
      if self.guided:
        with_caption, without = jnp.split(prediction, 2)
        prediction = guide(with_caption, without, due, guidance)
      if self.snapshots:
        estimate = process.denoised(x, prediction, time)
        if self.clip is not None:
          estimate = jnp.clip(estimate, -self.clip, self.clip)
        here = (kept == i)[:, None, None]
        snapshots = jnp.where(here, estimate[:, None], snapshots)
      x = process.step(
        x,
        prediction,
        time,
        times[i + 1],
        noise(i + 1) if draws else None,
        sampler=self.sampler,
        eta=self.eta,
        clip=self.clip,
      )
      return x, snapshots, decoded.cache

    snapshots = jnp.zeros((rows, self.snapshots, n, grid.dim), jnp.float32)
    carry = (noise(0), snapshots, cache)
    return Drawn(*jax.lax.fori_loop(0, self.steps + 1, step, carry))

  @contextlib.contextmanager
  def _hooked(
    self, i: Array, time: Array, rows: Bool[Array, " R"]
  ) -> Iterator[None]:
    """Runs the hook on what each block's attention returns, while tracing."""
    hook, layers = self.hook, itertools.count()
    if hook is None:
      yield
      return

    def intercept(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
      returned = function(*args, **kwargs)
      if not isinstance(context.module, Attention):
        return returned
      if context.method_name != "__call__":
        return returned
      (attended,) = returned
      layer = next(layers)
      # The run of the clean picture, which later text sees, is the model's own.
      changed = jax.lax.cond(
        i < self.steps,
        lambda x: hook(x, Moment(layer, i, time, rows)),
        lambda x: x,
        attended,
      )
      return (changed,)

    with nn.intercept_methods(intercept):
      yield


def make_denoiser(
  model: Any, sampling: Sampling, snapshots: int = 0, hook: Hook | None = None
) -> Denoiser | None:
  """How a model's pictures are drawn; None where they are codes, or none.

  Args:
    model: of the rows.
    sampling: names the sampler and its steps.
    snapshots: K, estimates of each picture that are kept.
    hook: see `Hook`.

  Raises:
    UserError: a sampler, or a number of steps, that does not go with the model's
      process; too many snapshots; any of these for codes.
  """
  if not model.vocabulary.continuous:
    given = [
      f"{name}={getattr(sampling, name)!r}"
      for name in DIFFUSION
      if getattr(sampling, name) != getattr(Sampling(), name)
    ]
    given += [f"snapshots={snapshots}"] * bool(snapshots)
    given += ["denoise_hook"] * (hook is not None)
    if given:
      raise UserError(
        f"{', '.join(given)}: for continuous pictures, which this model does not"
        f" draw; leave it out"
      )
    return None
  process, steps = model.process, sampling.diffusion_steps
  name = sampling.sampler or process.samplers[0]
  process.check_sampler(name, sampling.eta)
  process.times(steps)
  if not 0 <= snapshots < steps:
    raise UserError(
      f"snapshots={snapshots} of a picture drawn in diffusion_steps={steps};"
      f" allowed: 0 to {steps - 1}"
    )
  return Denoiser(
    model,
    steps,
    name,
    sampling.eta,
    sampling.clip_latents or None,
    sampling.guided,
    snapshots,
    hook,
  )
