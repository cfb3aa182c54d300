"""One optimizer step, pure and compiled once.

The gradient is that of the mean over the whole global batch: sums of losses
and of their weights are accumulated over microbatches and shards and divided
once, so the split of the batch does not change what is minimised.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fusionlab.batch import Batch
from fusionlab.sharding import rules
from fusionlab.train.partition import Partition
from fusionlab.train.state import TrainState, stream

Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], Metrics]


def split_batch(batch: Batch, accumulate: int, shards: int = 1) -> Batch:
  """Splits every array's first axis into `[accumulate, first/accumulate]`.

  Each microbatch takes the same share of every data shard, so that nothing
  moves between devices; whole groups stay together.

  Args:
    batch: arrays `[B, ...]`, and `[G, ...]` in the layout.
    accumulate: number of microbatches; divides B and G.
    shards: data shards of the first axis; `accumulate`·`shards` divides B.
  """
  groups = 0 if batch.layout is None else batch.layout.place.shape[0]
  if groups % (accumulate * shards):
    shards = 1  # groups that span shards: a microbatch is consecutive groups

  def split(x):
    rest = x.shape[1:]
    x = x.reshape(shards, accumulate, -1, *rest)
    return x.swapaxes(0, 1).reshape(accumulate, -1, *rest)

  return jax.tree.map(split, batch)


def make_train_step(
  model: Any,
  objective: Any,
  optimizer: optax.GradientTransformation,
  *,
  schedule: Callable[[Any], jax.Array] | None = None,
  dropout_seed: int | None = None,
  ema_decay: float = 0.0,
  accumulate: int = 1,
  on_nonfinite: str = "stop",
  partition: Partition | None = None,
  shardings: TrainState | None = None,
  trained_shardings: PyTree = None,
  mesh: Mesh | None = None,
) -> TrainStep:
  """Builds `train_step(state, batch) -> (state, metrics)`, jitted.

  Args:
    model: passed to the objective.
    objective: `(model, params, batch, *, train, dropout_key)` → dict of Means,
      of which `loss` is minimised. Where it has `balance`, that is applied once
      to the whole batch, before it is split into microbatches.
    optimizer: an optax transformation; it is given `step=` where it takes
      extra arguments.
    schedule: the learning rate, for the metric of that name only.
    dropout_seed: seed of the stream of dropout and of what the objective draws,
      into which step and microbatch are folded; None where nothing is drawn.
    ema_decay: decay of the moving average in `state.ema`, where there is one.
    accumulate: microbatches of one step.
    on_nonfinite: 'skip' keeps the old parameters and moments of a step whose
      loss or gradient is not finite; 'stop' leaves that to the caller, who
      reads `metrics['finite']`.
    partition: which parameters the optimizer sees; the others are not
      differentiated. None: all of them.
    shardings: of the state; None leaves placement to the arguments.
    trained_shardings: of what the optimizer sees; None: of all parameters.
    mesh: the devices of `shardings`; both or neither.

  Returns:
    The step. It donates `state`; a second trace raises AssertionError, because
    a recompile is a bug. Metrics are the objective's Means, and scalars
    `grad_norm`, `finite`, `tokens` (real tokens of the global batch),
    `skipped`, `learning_rate`.
  """
  optimizer = optax.with_extra_args_support(optimizer)
  balance = getattr(objective, "balance", lambda batch: batch)
  shards = 1 if mesh is None else rules.data_shards(mesh)
  if shardings is not None and trained_shardings is None:
    trained_shardings = shardings.params

  def split(params):
    return (params, None) if partition is None else partition.split(params)

  def merge(trained, frozen):
    return trained if partition is None else partition.merge(trained, frozen)

  def gradients(params, batch, key):
    trained, frozen = split(params)

    def loss(trained):
      means = objective(
        model, merge(trained, frozen), batch, train=True, dropout_key=key
      )
      return means["loss"].total, means

    (_, means), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    if trained_shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, trained_shardings)
    return grads, means

  def accumulated(params, batch, key):
    if accumulate == 1:
      return gradients(params, batch, key)

    def body(carry, part):
      index, micro = part
      micro_key = None if key is None else jax.random.fold_in(key, index)
      new = gradients(params, micro, micro_key)
      return jax.tree.map(jnp.add, carry, new), None

    parts = (
      jnp.arange(accumulate),
      split_batch(batch, accumulate, shards),
    )
    shapes = jax.eval_shape(
      lambda p: gradients(params, p[1], key),
      jax.tree.map(lambda x: x[0], parts),
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]

  def train_step(state: TrainState, batch: Batch):
    key = None
    if dropout_seed is not None:
      key = jax.random.fold_in(stream(dropout_seed, "dropout"), state.step)
    grads, means = accumulated(state.params, balance(batch), key)
    count = jnp.maximum(means["loss"].count, 1)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    trained, frozen = split(state.params)
    updates, opt_state = optimizer.update(
      grads, state.opt_state, trained, step=state.step
    )
    finite = jnp.isfinite(norm) & jnp.isfinite(means["loss"].total)
    finite &= jnp.isfinite(optax.tree.norm(updates))
    moved = optax.apply_updates(trained, updates)
    params = merge(moved, frozen)
    ema = state.ema
    if ema is not None:
      # Of what moves: an average of equal numbers is not them to the last bit.
      average = optax.incremental_update(moved, split(ema)[0], 1 - ema_decay)
      ema = merge(average, frozen)
    new = (params, opt_state, ema)
    skipped = state.skipped
    if on_nonfinite == "skip":
      old = (state.params, state.opt_state, state.ema)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
      skipped = skipped + jnp.where(finite, 0, 1).astype(skipped.dtype)
    metrics = {
      **means,
      "grad_norm": norm,
      "finite": finite,
      "tokens": (batch.segment > 0).sum(),
      "skipped": skipped,
    }
    if schedule is not None:
      metrics["learning_rate"] = schedule(state.step)
    params, opt_state, ema = new
    state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema=ema,
      skipped=skipped,
    )
    return state, metrics

  options: dict[str, Any] = {}
  if mesh is not None:
    options["out_shardings"] = (shardings, rules.replicated(mesh))
  function = _traced_once(_in_mesh(train_step, mesh))
  return jax.jit(function, donate_argnums=0, **options)


def _traced_once(function: Callable) -> Callable:
  """Raises on a second trace; chex's own counts all functions of one name."""
  traces = 0

  @functools.wraps(function)
  def once(*arguments):
    nonlocal traces
    traces += 1
    if traces > 1:
      raise AssertionError(
        f"{function.__name__} is compiled a second time: a shape or dtype of its"
        f" arguments changed between two steps (a batch's row length and tower"
        f" counts are shapes)"
      )
    return function(*arguments)

  return once


def _in_mesh(function: Callable, mesh: Mesh | None) -> Callable:
  """Lets the model pin its activations to the mesh while it is traced."""
  if mesh is None:
    return function

  @functools.wraps(function)
  def inside(*arguments):
    with rules.in_mesh(mesh):
      return function(*arguments)

  return inside


def make_eval_step(
  model: Any, objective: Any, *, mesh: Mesh | None = None
) -> EvalStep:
  """Builds `eval_step(params, batch) -> dict of Means`, jitted once.

  Args:
    model: passed to the objective.
    objective: called with `train=False`.
    mesh: the devices; None leaves placement to the arguments.
  """

  def eval_step(params, batch):
    return objective(model, params, batch, train=False)

  options: dict[str, Any] = {}
  if mesh is not None:
    options["out_shardings"] = rules.replicated(mesh)
  # Held-out loaders may have layouts of their own, so there is one trace for
  # each shape of batch, not one in all.
  return jax.jit(_in_mesh(eval_step, mesh), **options)
