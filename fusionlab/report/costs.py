"""Parameters and FLOPs of a recorded configuration, by tower."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fusionlab.analysis import parameters
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.report.records import Run
from fusionlab.towers import SHARED


@dataclasses.dataclass(frozen=True)
class Costs:
  """What the model is and what a token costs.

  Attributes:
    total: parameters.
    active: parameters that one token uses at most.
    embedding: of the tables, in `total` and `active`.
    patches: of what brings patches of latents in and out, in `total`; its FLOPs
      are in neither of the two below.
    towers: (name, its own parameters, those that its token uses).
    shared: parameters of no tower.
    forward: FLOPs of a token's forward pass, the same in every tower.
    step: FLOPs of a whole training step.
  """

  total: int
  active: int
  embedding: int
  patches: int
  towers: list[tuple[str, int, int]]
  shared: int
  forward: float
  step: float

  @property
  def training(self) -> float:
    """FLOPs of a token in training: the backward pass is twice the forward."""
    return 3 * self.forward


def experiment_of(config: Mapping[str, Any]) -> Experiment:
  """Builds what config.json recorded.

  Raises:
    UserError: no configuration, or not one of this fusionlab.
  """
  if not config:
    raise UserError("There is no config.json: the run ended before writing it.")
  try:
    return Experiment.from_mapping(config)
  except UserError as error:
    raise UserError(
      f"config.json is not a configuration of this fusionlab: {error}."
    ) from error


def costs_of(experiment: Experiment, run: Run) -> Costs:
  """Counts parameters and FLOPs; allocates nothing.

  Args:
    experiment: the run's, validated.
    run: its recorded parameters, and its vocabulary, of which
      `config.model.vocab_size` overrides the size.

  Raises:
    UserError: neither says how many ids there are, or nothing yet says how large
      the latents of pictures are.
  """
  model = experiment.model
  vocab_size = model.vocab_size or run.vocab_size
  if not vocab_size:
    raise UserError(
      "The size of the vocabulary is not known before the first checkpoint."
    )
  sizes = {name: math.prod(shape) for name, shape in run.parameters.items()}
  if sizes:
    counts = parameters.of_sizes(sizes, model.routed_towers)
  else:
    try:
      counts = parameters.count(model, vocab_size)
    except UserError as error:
      raise UserError(
        "The size of the latents is not known before the first checkpoint."
      ) from error
  per_tower = dict(counts.per_tower)
  shared = per_tower.pop(SHARED)
  length = experiment.data.row_length
  forward = model.forward_flops_per_token(vocab_size, length)
  return Costs(
    total=counts.total,
    active=counts.active,
    embedding=counts.embedding,
    patches=counts.patches,
    towers=[(name, own, shared + own) for name, own in per_tower.items()],
    shared=shared,
    forward=forward,
    step=3 * forward * experiment.train.batch_size * length,
  )
