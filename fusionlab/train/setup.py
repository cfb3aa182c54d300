"""From a configuration to what trains: mesh, data, model, objective."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from fusionlab.data import open_data
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.objectives import build_objective
from fusionlab.sharding import rules
from fusionlab.sharding.mesh import make_mesh
from fusionlab.tokenizers import Tokenizers, load_tokenizers


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


def default_group_rows(experiment: Experiment, mesh: Mesh) -> int:
  """Rows of a group where `data.group_rows` is 0: one device's microbatch.

  Args:
    experiment: its batch_size and accumulate.
    mesh: the devices.

  Raises:
    UserError: the data shards do not divide the rows of a microbatch.
  """
  train = experiment.train
  rows, shards = train.batch_size // train.accumulate, rules.data_shards(mesh)
  if rows % shards:
    raise UserError(
      f"config.train.batch_size={train.batch_size} in {train.accumulate}"
      f" microbatch(es) of {rows} rows cannot be split over {shards} data"
      f" shards; set it to a multiple of {train.accumulate * shards}"
    )
  return rows // shards


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
    tokenizers = load_tokenizers(data.text_tokenizer, data.image_tokenizer)
  opened = open_data(
    experiment,
    tokenizers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    group_rows=experiment.data.group_rows,
  )
  return Setup(
    experiment=experiment,
    mesh=mesh,
    tokenizers=tokenizers,
    data=opened,
    model=build_model(experiment.model, opened.vocabulary),
    objective=build_objective(
      experiment.objective, opened.vocabulary, opened.token_bytes
    ),
  )
