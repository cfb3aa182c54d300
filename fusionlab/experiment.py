"""The whole configuration of a run: every room's dataclass, put together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fusionlab.config import from_mapping, option
from fusionlab.data.config import DataConfig
from fusionlab.errors import ConfigError
from fusionlab.evaluate.config import EvaluateConfig
from fusionlab.models import MODELS
from fusionlab.models.config import TransformerConfig
from fusionlab.objectives import OBJECTIVES
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.sharding.mesh import MeshConfig
from fusionlab.towers import parse_by_tower, parse_copies, parse_towers
from fusionlab.train.config import InitConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What `configs/*.py` describe and `config.json` records.

  `model` and `objective` are the dataclass that their `kind` names; every
  implementation carries it as the class attribute `Config`.
  """

  model: TransformerConfig = option(
    TransformerConfig, "the architecture", kind_of=MODELS.config_class
  )
  objective: NextTokenConfig = option(
    NextTokenConfig, "what is minimised", kind_of=OBJECTIVES.config_class
  )
  data: DataConfig = option(DataConfig, "documents, rows and groups")
  optimizer: OptimizerConfig = option(OptimizerConfig, "AdamW and schedule")
  init: InitConfig = option(InitConfig, "the first parameters")
  train: TrainConfig = option(TrainConfig, "the loop")
  evaluate: EvaluateConfig = option(
    EvaluateConfig, "scores and samples of a trained model"
  )
  mesh: MeshConfig = option(MeshConfig, "devices")

  @classmethod
  def from_mapping(cls, mapping: Mapping[str, Any]) -> "Experiment":
    """Builds and validates an experiment from nested mappings.

    Raises:
      ConfigError: see `fusionlab.config.from_mapping`.
    """
    return from_mapping(cls, mapping)

  def check(self, path: str) -> None:
    """Rules that join two sections."""
    self.objective.check_model(f"{path}.objective", self.model)
    towers, optimizer = self.model.routed_towers, self.optimizer
    parse_towers(optimizer.freeze, towers, "optimizer.freeze")
    for key in ("learning_rate_of", "weight_decay_of"):
      parse_by_tower(getattr(optimizer, key), towers, f"optimizer.{key}")
    add, copy = self.init.add_towers, self.init.copy_towers
    parse_copies(add, towers, "init.add_towers", drawn=True)
    parse_copies(copy, towers, "init.copy_towers")
    rows, groups = self.train.batch_size, self.data.group_rows
    if groups and (rows // self.train.accumulate) % groups:
      raise ConfigError(
        f"{path}.data.group_rows={groups} does not divide the"
        f" {rows // self.train.accumulate} rows of a microbatch"
        f" ({path}.train.batch_size={rows} /"
        f" {path}.train.accumulate={self.train.accumulate})"
      )
