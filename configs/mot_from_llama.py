r"""A pretrained Llama gets an image tower: a Mixture-of-Transformers around it.

Paper: the architecture of Liang et al., "Mixture-of-Transformers" (arXiv 2411.04996),
grown as in Shi et al., "LMFusion" (arXiv 2412.15188, section 3): the image tower starts
as a copy of the text tower, which stays frozen with its rows of the tables, so that
text comes out as it did before. Pictures here are VQ codes, not diffused latents.

  python -m fusionlab.interop import MODEL.gguf runs/llama     # docs/guides/weights.md
  python -m experiments.run --config=configs/mot_from_llama.py:runs/llama

The argument is the imported folder (default runs/llama); sizes, rotary positions and
the text tokenizer are its own. Data: the pictures of configs/mot_chameleon.py with
their captions. With SmolLM2-135M a step of 2 rows of 256 took 14 to 15 seconds on 2 busy
CPU cores; what 2,000 steps reach has not been measured here (a GPU's work).
Expect the text of `--mode=generate --prompt='The capital of France is' --make=text`
to be the Llama's own, before and after.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from configs import mot_chameleon
from fusionlab.config import to_mapping
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models.mixture_of_transformers import MixtureOfTransformersConfig
from fusionlab.train import checkpoint
from fusionlab.train.config import InitConfig, OptimizerConfig, TrainConfig


def get_config(llama: str = "runs/llama") -> ConfigDict:
  """Returns the experiment around an imported Llama.

  Args:
    llama: the folder that `python -m fusionlab.interop import` wrote.

  Raises:
    UserError: no such folder, or one whose model is no dense text model.
  """
  if not Path(llama).is_dir():
    raise UserError(
      f"no folder {llama!r}; make it by python -m fusionlab.interop import"
      f" MODEL {llama}, or name another one: configs/mot_from_llama.py:FOLDER"
    )
  folder = checkpoint.find(llama)
  base = Experiment.from_mapping(checkpoint.read_meta(folder)["config"])
  if base.model.modalities != ("text",):
    raise UserError(
      f"{llama} has the modalities {base.model.modalities}; this config grows a"
      f" model of text alone"
    )
  given = {
    field.name: getattr(base.model, field.name)
    for field in dataclasses.fields(MixtureOfTransformersConfig)
    if field.name not in ("kind", "untie", "modalities", "towers", "vocab_size")
  }
  tiny = Experiment.from_mapping(mot_chameleon.get_config().to_dict())
  experiment = dataclasses.replace(
    tiny,
    model=MixtureOfTransformersConfig(**given),
    data=dataclasses.replace(
      tiny.data,
      text_tokenizer=str(folder / "tokenizers" / "text.json"),
      row_length=256,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-4, warmup_steps=100, b2=0.95, freeze="text"
    ),
    init=InitConfig(checkpoint=llama, add_towers="image:text"),
    train=TrainConfig(batch_size=2, num_steps=2000),
  )
  return ConfigDict(to_mapping(experiment))
