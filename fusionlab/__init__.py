"""Pretraining mixed-modal models with modality-aware sparsity, in JAX.

    model, params, tokenizers = fusionlab.load("runs/demo")

Names are imported when first used, so `import fusionlab` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fusionlab.batch import Batch as Batch
  from fusionlab.batch import Vocabulary as Vocabulary
  from fusionlab.batch import batch_of_ids as batch_of_ids
  from fusionlab.errors import UserError as UserError
  from fusionlab.experiment import Experiment as Experiment
  from fusionlab.generation.generate import generate as generate
  from fusionlab.models.transformer import build_model as build_model
  from fusionlab.objectives import build_objective as build_objective
  from fusionlab.train.checkpoint import load_model
  from fusionlab.train.initial import add_tower as add_tower
  from fusionlab.train.state import init_state as init_state
  from fusionlab.train.step import make_train_step as make_train_step

  load = load_model

__version__ = "0.1.0"

_PUBLIC = {
  "Batch": "fusionlab.batch:Batch",
  "Experiment": "fusionlab.experiment:Experiment",
  "UserError": "fusionlab.errors:UserError",
  "Vocabulary": "fusionlab.batch:Vocabulary",
  "add_tower": "fusionlab.train.initial:add_tower",
  "batch_of_ids": "fusionlab.batch:batch_of_ids",
  "build_model": "fusionlab.models.transformer:build_model",
  "build_objective": "fusionlab.objectives:build_objective",
  "generate": "fusionlab.generation.generate:generate",
  "init_state": "fusionlab.train.state:init_state",
  "load": "fusionlab.train.checkpoint:load_model",
  "make_train_step": "fusionlab.train.step:make_train_step",
}

__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
  from fusionlab.errors import nearest

  raise AttributeError(
    f"module 'fusionlab' has no attribute {name!r}{nearest(name, _PUBLIC)}"
  )


def __dir__() -> list[str]:
  return [*globals(), *_PUBLIC]
