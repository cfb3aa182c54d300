"""AdamW or Muon by path, and schedules that are functions of the step alone.

Sources: AdamW, arXiv 1711.05101, Algorithm 2; Muon with the root mean square of
AdamW's updates, arXiv 2502.16982, Eq. 4; warm-up-stable-decay ("wsd"),
arXiv 2404.06395, §4.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from fusionlab.errors import ConfigError
from fusionlab.sharding.axes import EMBED, LAYERS, VOCAB
from fusionlab.train.config import OptimizerConfig

# Of an update's entries, with which rates and decay are those of AdamW.
_ADAM_RMS = 0.2

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def path_name(path: tuple[Any, ...]) -> str:
  """Writes a key path as 'layers/ffn/image/w_in'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns {'layers/ffn/image/w_in': leaf} of a tree of parameters."""
  return {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def make_schedule(config: OptimizerConfig, schedule_steps: int) -> Schedule:
  """Builds the learning rate as a function of the step alone.

  Linear warm-up from 0 over `warmup_steps` (the first update already moves),
  the peak held for `stable_fraction` of what is left, then the named shape down
  to `final_fraction` of the peak, held after `schedule_steps`. `wsd` falls
  linearly after its hold, 0.8 of the steps where `stable_fraction` is 0.

  Args:
    config: shape, peak and fractions.
    schedule_steps: length of the schedule in optimizer steps.

  Returns:
    The function from the number of updates already made to the float32 rate of
    the next one.
  """
  warmup = config.warmup_steps
  stable = config.stable_fraction
  if config.schedule == "wsd" and stable == 0:
    stable = 0.8
  after = max(schedule_steps - warmup, 1)
  fall_start = warmup + stable * after
  fall_steps = max(warmup + after - fall_start, 1.0)
  peak, final = config.learning_rate, config.final_fraction

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    progress = jnp.clip((step - fall_start) / fall_steps, 0.0, 1.0)
    if config.schedule == "constant":
      shape = jnp.ones_like(progress)
    elif config.schedule == "cosine":
      shape = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
      shape = 1 - progress
    fall = final + (1 - final) * shape
    return peak * jnp.where(step < warmup, rise, fall)

  return schedule


def decay_mask(config: OptimizerConfig, params: PyTree) -> dict[str, bool]:
  """Says of each parameter path whether weight decay acts on it.

  Args:
    config: `no_decay` is searched for in each path.
    params: the tree of parameters, or of their shapes.

  Raises:
    ConfigError: `no_decay` is not a regular expression.
  """
  pattern = _pattern(config)
  return {
    name: pattern is None or pattern.search(name) is None
    for name in named_leaves(params)
  }


def _pattern(config: OptimizerConfig) -> re.Pattern[str] | None:
  if not config.no_decay:
    return None
  try:
    return re.compile(config.no_decay)
  except re.error as error:
    raise ConfigError(
      f"config.optimizer.no_decay={config.no_decay!r} is not a regular"
      f" expression ({error}); e.g. '(norm|bias)'"
    ) from None


def scale_by_step(
  schedule: Schedule,
) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by minus the rate of the step that is passed in.

  The state holds no count: a skipped update or a restored checkpoint cannot
  shift the schedule.

  Args:
    schedule: see `make_schedule`.
  """

  def update(updates, state, params=None, **extra):
    del params
    rate = -schedule(extra["step"])
    return jax.tree.map(lambda u: u * rate.astype(u.dtype), updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def make_optimizer(
  config: OptimizerConfig,
  schedule: Schedule,
  *,
  axes: PyTree = None,
  towers: PyTree = None,
  rates: Mapping[str, float] = MappingProxyType({}),
  decays: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
  """Builds clip → Adam or Muon → decoupled decay → rate.

  With Muon the parameters that are no matrices get Adam with Nesterov momentum.

  Args:
    config: `config.optimizer`.
    schedule: see `make_schedule`; `update` takes `step=` as an extra argument.
    axes: tree of each parameter's axis names (`model.param_axes()`), which Muon
      needs.
    towers: tree of each parameter's tower, for `rates` and `decays`.
    rates: tower -> factor on the rate, its decay's share included.
    decays: tower -> weight decay in place of `config.weight_decay`.

  Raises:
    ConfigError: `no_decay` is not a regular expression.
  """
  _pattern(config)

  def mask(params):
    decays = decay_mask(config, params)
    return jax.tree_util.tree_map_with_path(
      lambda path, _: decays[path_name(path)], params
    )

  parts = []
  if config.clip_norm:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  if config.kind == "muon":
    parts.append(
      optax.contrib.muon(
        -1.0,  # The rate comes last, with its sign.
        beta=config.muon_momentum,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers=lambda _: muon_matrices(axes),
        consistent_rms=_ADAM_RMS,
      )
    )
  else:
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if decays:
    decay_of = jax.tree.map(
      lambda tower: decays.get(tower, config.weight_decay), towers
    )
    parts.append(optax.masked(_add_decayed(decay_of), mask))
  elif config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask))
  parts.append(scale_by_step(schedule))
  if rates:
    factors = jax.tree.map(lambda tower: rates.get(tower, 1.0), towers)
    parts.append(
      optax.stateless(
        lambda updates, _: jax.tree.map(
          lambda u, factor: u * factor, updates, factors
        )
      )
    )
  return optax.chain(*parts)


def _add_decayed(decay_of: PyTree) -> optax.GradientTransformation:
  """Adds each parameter times its own decay; `masked` leaves some out."""

  def update(updates: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(
      lambda u, p, decay: u if _left_out(u) else u + decay * p,
      updates,
      params,
      decay_of,
      is_leaf=_left_out,
    )

  return optax.stateless(update)


def _left_out(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def muon_matrices(axes: PyTree) -> PyTree:
  """Which parameters Muon takes as matrices, and how.

  Those that map the model's width to something, or something to it: the width is
  one side of the matrix, all other axes but the layers' the other one (which side
  is which does not matter to an orthogonal update). Tables of the vocabulary and
  norms are Adam's.

  Args:
    axes: tree of each parameter's axis names.

  Returns:
    A tree of `optax.contrib.MuonDimensionNumbers`, None where Adam is used.
  """

  def matrix(
    names: tuple[str, ...],
  ) -> optax.contrib.MuonDimensionNumbers | None:
    others = [i for i, name in enumerate(names) if name not in (EMBED, LAYERS)]
    if EMBED not in names or VOCAB in names or not others:
      return None
    return optax.contrib.MuonDimensionNumbers(
      (names.index(EMBED),), tuple(others)
    )

  return jax.tree.map(matrix, axes, is_leaf=lambda x: isinstance(x, tuple))
