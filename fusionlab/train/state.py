"""The training state: created sharded, described without being allocated."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PyTree


@flax.struct.dataclass
class TrainState:
  """What a step changes and a checkpoint holds.

  Attributes:
    step: int32 [], steps taken, skipped updates included.
    params: the tree of parameters, float32; frozen ones may be bfloat16.
    opt_state: optax's state.
    ema: moving average of `params`, in their dtypes, or None.
    skipped: int32 [], updates left out because they were not finite.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  ema: PyTree | None
  skipped: Int[Array, ""]

  @property
  def eval_params(self) -> PyTree:
    """The parameters that are scored: the moving average where one is kept."""
    return self.params if self.ema is None else self.ema


def stream(seed: int, name: str) -> jax.Array:
  """Returns the root key of a named random stream.

  Args:
    seed: `config.train.seed`.
    name: 'params', 'dropout', …; its SHA-256 is folded into the root, so
      streams never depend on the order in which they are asked for.

  Returns:
    A typed key; fold the step into it.
  """
  digest = hashlib.sha256(name.encode()).digest()
  return jax.random.fold_in(
    jax.random.key(seed), int.from_bytes(digest[:4], "little")
  )


def _whole(params: PyTree) -> PyTree:
  """What is trained where nothing is frozen."""
  return params


def new_state(
  params: PyTree,
  optimizer: optax.GradientTransformation,
  *,
  ema: bool = False,
  trained: Callable[[PyTree], PyTree] = _whole,
) -> TrainState:
  """The state before the first step, of given parameters.

  Args:
    params: the tree of parameters.
    optimizer: the optax transformation.
    ema: whether a moving average of the parameters is kept.
    trained: what of the parameters the optimizer sees.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trained(params)),
    # A copy: two donated arguments may not share one buffer.
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    skipped=jnp.zeros((), jnp.int32),
  )


def abstract_state(
  params: PyTree,
  optimizer: optax.GradientTransformation,
  *,
  ema: bool = False,
  trained: Callable[[PyTree], PyTree] = _whole,
) -> TrainState:
  """Describes the state by shapes and dtypes, allocating nothing.

  Args:
    params: tree of parameters, or of their shapes and dtypes.
    optimizer: the optax transformation.
    ema: whether a moving average of the parameters is kept.
    trained: what of the parameters the optimizer sees.
  """
  return jax.eval_shape(
    lambda params: new_state(params, optimizer, ema=ema, trained=trained),
    params,
  )


def state_shardings(
  abstract: TrainState,
  params: PyTree,
  replicated: NamedSharding,
  *,
  trained: PyTree = None,
) -> TrainState:
  """Gives every leaf of the state its sharding.

  Args:
    abstract: see `abstract_state`.
    params: the parameters' shardings, which the moving average inherits.
    replicated: for counters.
    trained: shardings of what the optimizer sees, which moments inherit; None:
      of all parameters.
  """
  by_path = dict(
    jax.tree_util.tree_leaves_with_path(params if trained is None else trained)
  )

  def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    """A moment's path ends with its parameter's."""
    del leaf
    ends = (path[i:] for i in range(len(path)))
    return next((by_path[e] for e in ends if e in by_path), replicated)

  opt_state = jax.tree_util.tree_map_with_path(of, abstract.opt_state)
  return dataclasses.replace(
    abstract,
    step=replicated,
    params=params,
    opt_state=opt_state,
    ema=None if abstract.ema is None else params,
    skipped=replicated,
  )


def init_state(
  init_params: Callable[[jax.Array], PyTree],
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  ema: bool = False,
  trained: Callable[[PyTree], PyTree] = _whole,
  shardings: TrainState | None = None,
) -> TrainState:
  """Creates the state, each device making only its own shards.

  Args:
    init_params: key → tree of parameters.
    optimizer: the optax transformation.
    key: the root of the 'params' stream.
    ema: whether a moving average of the parameters is kept.
    trained: what of the parameters the optimizer sees.
    shardings: see `state_shardings`; None leaves it on the default device.
  """
  options: dict[str, Any] = {}
  if shardings is not None:
    options["out_shardings"] = shardings
  create = jax.jit(
    lambda k: new_state(init_params(k), optimizer, ema=ema, trained=trained),
    **options,
  )
  return create(key)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """Puts arrays that every process has whole where the shardings say.

  Args:
    tree: arrays on one device of each process.
    shardings: over the devices of all processes.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  return jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(
      leaf.shape, sharding, np.asarray(leaf).__getitem__
    ),
    tree,
    shardings,
  )


def with_shardings(abstract: TrainState, shardings: TrainState) -> TrainState:
  """Joins shapes and shardings into what a restore needs."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract,
    shardings,
  )
