r"""Mixture-of-Transformers in the Chameleon setting (text and VQ image codes).

Paper: Liang et al., "Mixture-of-Transformers" (arXiv 2411.04996), section 3.2;
sizes, batch and steps from Tables 1, 3 and 4. Its comparison is Figures 5 and 6:
steps to equal loss of MoT against the dense model at equal FLOPs per step.

  python -m experiments.run --config=configs/mot_chameleon.py
  python -m experiments.run --config=configs/mot_chameleon.py:7b --mode=summary
  python -m experiments.run --config=configs/mot_chameleon.py \
      --config.model.untie='' --workdir=runs/dense          # the dense control

`tiny` (default): the pictures of Emoji 0.6 in two styles with their names, flags with
facts, World Factbook passages. On 2 CPU cores 950 steps of 1,920 places at 3,600 to
4,400 tokens/s: 7 to 8 minutes of training, no network, then 2 to 3 minutes of scores,
pictures and the report. After `config.train.max_seconds` (8 minutes) a slower machine
stops early, with pictures that are as much worse. Expect, seed 0: the own picture is
the nearest of 1,608 for 93 to 94% of 256 training captions (84% after 781 steps, on busy
cores) and for 12 to 13% of the 92 held-out (picture, style) pairs (chance 0.06%), for
none to three of 87 pictures never seen; held-out text 4.2 to 4.4 nats a token. The
pictures are memorised: held-out image loss rises while they are. How the settings were found:
experiments/results/mot_chameleon/tiny_pictures.md.

The paper's sizes (37m 94m 443m 880m 1.5b 7b; `1_5b` is the same as `1.5b`) keep
its rows of 4,096 tokens, batch, steps and 65,536 ids. The paper does not state
the learning rate of this setting; MoMa (arXiv 2407.21770), by the same group on
the same data, does: 1e-4 falling linearly to 1e-6 after 4,000 warm-up steps. The
paper's data is not public: bring your own by `config.data.sources` (BUILD.md).

What differs from the paper: the data, and at `tiny` the size, the vocabulary
(4,096 ids), rows of 384 tokens, Muon, word dropout and the schedule.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fusionlab.config import to_mapping
from fusionlab.data.config import DataConfig, SourceConfig
from fusionlab.errors import UserError, nearest
from fusionlab.evaluate.config import EvaluateConfig
from fusionlab.experiment import Experiment
from fusionlab.models.mixture_of_transformers import (
  SIZES,
  MixtureOfTransformersConfig,
)
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.sharding.mesh import MeshConfig
from fusionlab.train.config import OptimizerConfig, TrainConfig

# An epoch passes twice over the pictures and over seven tenths of the passages:
# nearly as many image codes as text tokens (the paper has as many), and enough
# passages to fill the text places that pictures leave.
SOURCES = {
  "openmoji": SourceConfig(kind="openmoji", weight=2.0),
  "flags": SourceConfig(kind="flags", weight=1.0),
  "factbook": SourceConfig(kind="factbook", weight=0.7),
}


def get_config(size: str = "tiny") -> ConfigDict:
  """Returns the experiment at one size, with every key.

  Args:
    size: `tiny` or a size of the paper.

  Raises:
    UserError: an unknown size, with the nearest.
  """
  size = size.replace("_", ".")
  if size not in ("tiny", *SIZES):
    raise UserError(
      f"unknown size {size!r} of mot_chameleon{nearest(size, ('tiny', *SIZES))}"
    )
  experiment = _tiny() if size == "tiny" else _paper(size)
  return ConfigDict(to_mapping(experiment))


def _tiny() -> Experiment:
  # Few pictures seen often, captions in front of most of them: eight minutes teach
  # what a caption means for some 1,400 pictures, and little about 3,100. Passages
  # fill what rows of pictures leave; the last groups of an epoch are never full,
  # so it is long.
  emoji = dataclasses.replace(SOURCES["openmoji"], path="0.6", weight=8.0)
  flags = dataclasses.replace(SOURCES["flags"], weight=8.0)
  factbook = dataclasses.replace(SOURCES["factbook"], weight=0.347)
  return Experiment(
    model=MixtureOfTransformersConfig(dim=192, num_layers=4, num_heads=6),
    objective=NextTokenConfig(word_dropout=1.0),
    data=DataConfig(
      sources={"openmoji": emoji, "flags": flags, "factbook": factbook},
      row_length=384,  # five pictures with their captions
      image_first=0.1,
      caption_drop=0.05,
      first_caption=1.0,
    ),
    optimizer=OptimizerConfig(
      kind="muon",
      learning_rate=3e-3,
      schedule="cosine",
      warmup_steps=50,
      stable_fraction=0.3,
      final_fraction=0.02,
      b2=0.98,
    ),
    train=TrainConfig(batch_size=5, num_steps=950, max_seconds=480.0),
    evaluate=EvaluateConfig(guidance=2.0),
  )


def _paper(name: str) -> Experiment:
  size = SIZES[name]
  # From 443M on, the activations of 4,096-token rows outgrow the weights.
  large = size.num_layers >= 24
  model: dict[str, Any] = {
    "dim": size.dim,
    "num_layers": size.num_layers,
    "num_heads": size.num_heads,
    "vocab_size": 65_536,
    "remat": "full" if large else "none",
  }
  return Experiment(
    model=MixtureOfTransformersConfig(**model),
    data=DataConfig(sources=SOURCES, row_length=4096),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      schedule="linear",
      warmup_steps=4000,
      final_fraction=0.01,
      b2=0.95,
      eps=1e-5,
    ),
    train=TrainConfig(
      batch_size=size.batch_rows,
      num_steps=size.num_steps,
      eval_every=1000,
      checkpoint_every=1000,
    ),
    mesh=MeshConfig(preset="auto"),
  )
