r"""LMFusion: a pretrained Llama learns pictures, and its text stays what it was.

Paper: Shi et al., "LMFusion" (arXiv 2412.15188), sections 3 and 4: every parameter of
text is a Llama's and frozen; the image tower starts as its copy, with a U-Net's halves
from scratch, and learns by a denoising loss of pictures and, through frozen text, by
the loss of the captions behind them.

  python -m fusionlab.interop fetch smollm2 runs/smollm2       # once: 93 MB, Apache-2.0
  python -m experiments.run --config=configs/lmfusion.py
  python -m experiments.run --config=configs/lmfusion.py:runs/llama   # any imported one
  python -m experiments.run --config=configs/lmfusion.py:tiny         # needs nothing

The paper's other variants are keys (section 5.1, Figure 3; docs/models/lmfusion.md):

  --config.model.untie='ffn ffn_norm'     shallow: attention is shared
  --config.model.untie=''                 none: dense, and only the patches are new
  --config.optimizer.freeze=''            text learns at the rate of pictures, ...
  --config.optimizer.learning_rate_of='text:0.1 shared:0.1'     ... at a tenth of it

AdamW at 1e-4 falling by a cosine to 1.5e-5, as in the paper; its 4,000 warm-up steps of
250,000 are 100 of 2,000 here. Data: pictures of configs/mot_transfusion.py with their
captions, which stand in front of four pictures of five, and some passages, on which
held-out text is scored. With SmolLM2-135M this is a GPU's work: the page above
has the bytes of its parameters, gradients and moments.

`tiny` first trains a text model of its own, in <workdir>/text_model, on captions and
passages (`config.init.text_steps`), then grows it, in one command.

What differs from the paper: the base model (Llama-3 8B there), the data (380M pairs),
the autoencoder (ours has 4 channels), rows of 256, and at `tiny` the optimizer and the
process, rectified flow (configs/mot_transfusion.py says why).
"""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import mot_transfusion
from fusionlab.config import to_mapping
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models.config import TransformerConfig
from fusionlab.models.lmfusion import LMFusionConfig
from fusionlab.train import checkpoint
from fusionlab.train.config import InitConfig, OptimizerConfig, TrainConfig

_BASE = "runs/smollm2"
_FROZEN = "text shared"
_ADDED = "image:text"


def get_config(base: str = _BASE) -> ConfigDict:
  """Returns the experiment around a text model.

  Args:
    base: the folder that `python -m fusionlab.interop fetch` or `import` wrote, or
      `tiny`.

  Raises:
    UserError: no such folder, or one whose model is no dense text model.
  """
  experiment = _tiny() if base == "tiny" else _around(base)
  return ConfigDict(to_mapping(experiment))


def _tiny() -> Experiment:
  of_towers = _of_pictures(passages=0.1)
  return dataclasses.replace(
    of_towers,
    model=LMFusionConfig(dim=192, num_layers=4, num_heads=6, process="flow"),
    optimizer=dataclasses.replace(of_towers.optimizer, freeze=_FROZEN),
    init=InitConfig(text_steps=250, add_towers=_ADDED),
    train=TrainConfig(batch_size=5, num_steps=600, max_seconds=300.0),
  )


def _around(base: str) -> Experiment:
  if not Path(base).is_dir():
    fetch = f"python -m fusionlab.interop fetch smollm2 {base}"
    raise UserError(
      f"no folder {base!r} with a text model; make it by `{fetch}`, name another"
      f" imported one (configs/lmfusion.py:FOLDER), or take"
      f" configs/lmfusion.py:tiny, which needs none"
    )
  folder = checkpoint.find(base)
  text = Experiment.from_mapping(checkpoint.read_meta(folder)["config"])
  if text.model.modalities != ("text",):
    raise UserError(
      f"{base} has the modalities {text.model.modalities}; LMFusion grows a model"
      f" of text alone"
    )
  own = ("kind", "untie", "modalities", "towers", "vocab_size", "causal")
  given: dict[str, Any] = {
    field.name: getattr(text.model, field.name)
    for field in dataclasses.fields(TransformerConfig)
    if field.name not in own
  }
  of_towers = _of_pictures(passages=0.02)
  return dataclasses.replace(
    of_towers,
    model=LMFusionConfig(
      unet_channels=128, text_length=text.data.row_length, **given
    ),
    data=dataclasses.replace(
      of_towers.data,
      text_tokenizer=str(folder / "tokenizers" / "text.json"),
      row_length=min(256, text.data.row_length),
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      schedule="cosine",
      warmup_steps=100,
      final_fraction=0.15,
      b2=0.95,
      freeze=_FROZEN,
    ),
    init=InitConfig(checkpoint=base, add_towers=_ADDED),
    train=TrainConfig(batch_size=2, num_steps=2000),
  )


def _of_pictures(passages: float) -> Experiment:
  """configs/mot_transfusion.py with passes over the passages in an epoch."""
  given = Experiment.from_mapping(mot_transfusion.get_config().to_dict())
  sources = dict(given.data.sources)
  sources["factbook"] = dataclasses.replace(
    sources["factbook"], weight=passages
  )
  return dataclasses.replace(
    given, data=dataclasses.replace(given.data, sources=sources)
  )
