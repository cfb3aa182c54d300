"""From a configuration to what trains: mesh, data, model, objective, steps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from fusionlab.analysis.devices import peak_flops
from fusionlab.data import open_data
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.objectives import build_objective
from fusionlab.sharding import rules
from fusionlab.sharding.batches import process_share
from fusionlab.sharding.mesh import make_mesh
from fusionlab.tokenizers import Tokenizers, load_tokenizers
from fusionlab.towers import parse_by_tower, tower_counts
from fusionlab.train.initial import drawing, grown_params
from fusionlab.train.optimizer import make_optimizer, make_schedule
from fusionlab.train.partition import make_partition
from fusionlab.train.state import (
  TrainState,
  abstract_state,
  init_state,
  new_state,
  place,
  state_shardings,
  stream,
)
from fusionlab.train.step import (
  EvalStep,
  TrainStep,
  make_eval_step,
  make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """The parts of a run that training and evaluation share.

  Attributes:
    experiment: the configuration they were built from.
    mesh: the devices of all processes.
    tokenizers: text and pictures to ids.
    data: loaders, see `fusionlab.data.open_data`.
    model, objective: see `fusionlab.models`, `fusionlab.objectives`.
  """

  experiment: Experiment
  mesh: Mesh
  tokenizers: Tokenizers
  data: Any
  model: Any
  objective: Any

  @property
  def train_flops_per_token(self) -> float:
    """Model FLOPs of one token's training step: three forward passes.

    Two, of a frozen tower's tokens in its matrices: only activations have
    gradients there. The tables count as trained.
    """
    model = self.experiment.model
    forward = model.forward_flops_per_token(
      self.data.vocabulary.size, self.experiment.data.row_length
    )
    freeze = self.experiment.optimizer.freeze.split()
    if not freeze:
      return 3 * forward
    towers = model.routed_towers
    places = tower_counts(self.data.layout_counts, towers.of_modality)
    share = dict(zip(towers.names, np.divide(places, sum(places)), strict=True))
    spared = math.fsum(
      flops * share.get(leaf, 1.0)
      for name, flops in model.matrix_flops.items()
      for leaf in towers.leaves(name)
      if leaf in freeze
    )
    return 3 * forward - spared

  @property
  def peak_flops(self) -> float | None:
    """FLOPs/s of all devices together; None where one is not known."""
    peaks = [peak_flops(device) for device in self.mesh.devices.flat]
    return None if None in peaks else math.fsum(p for p in peaks if p)


@dataclasses.dataclass(frozen=True)
class Steps:
  """The jitted steps of a run and the state they work on.

  Attributes:
    abstract: shapes and dtypes of the state.
    shardings: of the state.
    train_step, eval_step: see `fusionlab.train.step`.
    init: makes the first state, sharded.
  """

  abstract: TrainState
  shardings: TrainState
  train_step: TrainStep
  eval_step: EvalStep
  init: Callable[[], TrainState]


def build_steps(setup: Setup, *, start: str = "") -> Steps:
  """Builds the steps of a setup; compiles and allocates nothing.

  Args:
    setup: its parts.
    start: checkpoint of the first parameters, in place of
      `config.init.checkpoint`.
  """
  experiment, mesh = setup.experiment, setup.mesh
  config = experiment.train
  model, vocabulary = setup.model, setup.data.vocabulary
  schedule = make_schedule(experiment.optimizer, config.schedule_steps)
  partition = make_partition(experiment.optimizer, model, vocabulary)
  axes = model.param_axes()
  trained_axes = axes if partition is None else partition.trained_axes
  optimizer = make_optimizer(
    experiment.optimizer,
    schedule,
    axes=trained_axes,
    towers=None if partition is None else partition.trained_towers,
    rates=_by_tower(experiment, "learning_rate_of"),
    decays=_by_tower(experiment, "weight_decay_of"),
  )
  keeps_ema = experiment.optimizer.ema_decay > 0

  def trained(params: PyTree) -> PyTree:
    return params if partition is None else partition.split(params)[0]

  def kept(params: PyTree) -> PyTree:
    return params if partition is None else partition.kept(params)

  abstract = abstract_state(
    jax.eval_shape(kept, model.abstract_params()),
    optimizer,
    ema=keeps_ema,
    trained=trained,
  )
  trained_shardings = rules.param_shardings(
    trained_axes, jax.eval_shape(trained, abstract.params), mesh
  )
  shardings = state_shardings(
    abstract,
    rules.param_shardings(axes, abstract.params, mesh),
    rules.replicated(mesh),
    trained=trained_shardings,
  )

  def init() -> TrainState:
    key = stream(config.seed, "params")
    options: dict[str, Any] = {"ema": keeps_ema, "trained": trained}
    checkpoint = start or experiment.init.checkpoint
    if not checkpoint:
      draw = drawing(experiment.init, model)
      return init_state(
        lambda key: kept(draw(key)),
        optimizer,
        key,
        shardings=shardings,
        **options,
      )
    loaded = dataclasses.replace(experiment.init, checkpoint=checkpoint)
    params = kept(grown_params(loaded, model, setup.tokenizers, key))
    begin = jax.jit(
      lambda params: new_state(params, optimizer, **options),
      donate_argnums=0,
      out_shardings=shardings,
    )
    return begin(place(params, shardings.params))

  return Steps(
    abstract=abstract,
    shardings=shardings,
    train_step=make_train_step(
      setup.model,
      setup.objective,
      optimizer,
      schedule=schedule,
      dropout_seed=config.seed,
      ema_decay=experiment.optimizer.ema_decay,
      accumulate=config.accumulate,
      on_nonfinite=config.on_nonfinite,
      partition=partition,
      shardings=shardings,
      trained_shardings=trained_shardings,
      mesh=mesh,
    ),
    eval_step=make_eval_step(setup.model, setup.objective, mesh=mesh),
    init=init,
  )


def _by_tower(experiment: Experiment, key: str) -> dict[str, float]:
  return parse_by_tower(
    getattr(experiment.optimizer, key),
    experiment.model.routed_towers,
    f"optimizer.{key}",
  )


def default_group_rows(experiment: Experiment, mesh: Mesh) -> int:
  """Rows of a group where `data.group_rows` is 0: one device's microbatch.

  One row, where devices share the rows.

  Args:
    experiment: its batch_size and accumulate.
    mesh: the devices.

  Raises:
    UserError: the data shards do not divide the rows of a microbatch.
  """
  train = experiment.train
  rows, shards = train.batch_size // train.accumulate, rules.data_shards(mesh)
  one_row = rules.sequence_shards(mesh) > 1
  if rows % shards:
    raise UserError(
      f"config.train.batch_size={train.batch_size} in {train.accumulate}"
      f" microbatch(es) of {rows} rows cannot be split over {shards} data"
      f" shards; set it to a multiple of {train.accumulate * shards}"
    )
  return 1 if one_row else rows // shards


def build(
  experiment: Experiment,
  *,
  mesh: Mesh | None = None,
  tokenizers: Tokenizers | None = None,
) -> Setup:
  """Builds the parts; prepares the data where the cache lacks it.

  Args:
    experiment: resolved, so that `data.group_rows` is not 0.
    mesh: default: what `config.mesh` says.
    tokenizers: default: the files that `config.data` names.

  Raises:
    UserError: whatever is wrong with the configuration or the data.
  """
  mesh = make_mesh(experiment.mesh) if mesh is None else mesh
  if tokenizers is None:
    data = experiment.data
    tokenizers = load_tokenizers(
      data.text_tokenizer,
      data.image_tokenizer,
      latent_patch=data.latent_patch,
    )
  model = build_model(
    experiment.model, tokenizers.vocabulary, experiment.data.row_length
  )
  rules.check_params(model.param_axes(), model.abstract_params(), mesh)
  index, count = process_share(mesh)
  opened = open_data(
    experiment,
    tokenizers,
    process_index=index,
    process_count=count,
    group_rows=experiment.data.group_rows,
    parts=rules.sequence_shards(mesh),
  )
  return Setup(
    experiment=experiment,
    mesh=mesh,
    tokenizers=tokenizers,
    data=opened,
    model=model,
    objective=build_objective(
      experiment.objective, opened.vocabulary, opened.token_bytes
    ),
  )
