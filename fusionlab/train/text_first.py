"""A text model of a run's own, for what grows one and has none to start from.

What is trained on text alone is a folder like any other run's, and the run starts
from it as from any checkpoint.
"""

import dataclasses
from pathlib import Path

from fusionlab.experiment import Experiment
from fusionlab.models.config import TransformerConfig
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.train.config import InitConfig

# Within the workdir.
FOLDER = "text_model"


def text_model(experiment: Experiment) -> Experiment:
  """The run that trains the text tower of another alone, as a dense model.

  On the texts of the same sources, captions among them, in rows and batches of the
  same size, by the same optimizer with nothing frozen.

  Args:
    experiment: `config.init.text_steps` of it are trained.
  """
  model, train = experiment.model, experiment.train
  sizes = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(TransformerConfig)
    if field.name not in ("kind", "causal", "untie", "vocab_size")
  }
  objective = experiment.objective
  return dataclasses.replace(
    experiment,
    model=TransformerConfig(
      **(sizes | {"modalities": model.modalities[:1], "towers": (0,)})
    ),
    objective=NextTokenConfig(z_loss=objective.z_loss, chunk=objective.chunk),
    data=dataclasses.replace(
      experiment.data,
      image_tokenizer="none",
      latent_patch=0,
      layout="auto",
      group_rows=0,
    ),
    optimizer=dataclasses.replace(
      experiment.optimizer, freeze="", learning_rate_of="", weight_decay_of=""
    ),
    init=InitConfig(),
    train=dataclasses.replace(
      train,
      num_steps=experiment.init.text_steps,
      schedule_steps=0,
      max_seconds=0.0,
      profile_start=0,
    ),
  )


def start_of(experiment: Experiment, workdir: Path) -> str:
  """What a run's first parameters are loaded from; '' where they are drawn.

  Args:
    experiment: its `config.init`.
    workdir: of the run.
  """
  if experiment.init.text_steps:
    return str(workdir / FOLDER)
  return experiment.init.checkpoint
