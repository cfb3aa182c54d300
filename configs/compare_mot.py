r"""Mixture-of-Transformers against dense, and what between them brings the gain.

Paper: Liang et al., "Mixture-of-Transformers" (arXiv 2411.04996): s, the steps MoT
needs for the dense model's loss over the dense model's steps, is 0.26 for images and
0.55 for text at 37M (Figure 5, training loss), 0.25 and 0.60 held out (Figure 24);
untying the feed-forward alone brings most of it, queries, keys and values a further
third for images, norms next to nothing (section 3.5, Figure 14). Those runs are 160,000
steps of 1.6M tokens; gains grow with steps and batch (Figure 18).

  python -m experiments.compare --config=configs/compare_mot.py
  python -m experiments.compare --config=configs/compare_mot.py:100 --workdir=runs/quick

Dense, `ffn`, `ffn q k v` and everything untied, three seeds, on all pictures with
captions and Factbook passages of the default data. One FLOP count a token: d=128, 4
layers, 4 heads, SwiGLU 512 wide; rows of 512, 4 a step, a constant rate, since s is
read at every step. A run of 600 steps took 4 and a half minutes on 2 CPU cores.
Expect the paper's sign and order, not its fractions: full MoT has s = 0.85 for images and
0.90 for text (experiments/results/mot_chameleon/compare_mot.md).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import mot_chameleon
from fusionlab.config import to_mapping
from fusionlab.experiment import Experiment
from fusionlab.models.mixture_of_transformers import MixtureOfTransformersConfig
from fusionlab.sharding.mesh import MeshConfig
from fusionlab.train.config import OptimizerConfig, TrainConfig

UNTIED = {
  "dense": "",
  "ffn": "ffn",
  "ffn_qkv": "ffn q k v",
  "mot": "q k v o qk_norm mixer_norm ffn ffn_norm final_norm",
}


def get_config(num_steps: str = "600") -> ConfigDict:
  """Returns the comparison: experiments by name, control and seeds.

  Args:
    num_steps: optimizer steps of every run.
  """
  base = Experiment.from_mapping(mot_chameleon.get_config("37m").to_dict())
  base = dataclasses.replace(
    base,
    data=dataclasses.replace(base.data, row_length=512),
    optimizer=OptimizerConfig(
      learning_rate=3e-3, schedule="constant", warmup_steps=50, b2=0.95
    ),
    train=TrainConfig(
      batch_size=4,
      num_steps=int(num_steps),
      log_every=50,
      eval_every=max(int(num_steps) // 20, 1),
      eval_batches=8,
      checkpoint_every=0,
      keep_checkpoints=1,
    ),
    mesh=MeshConfig(),
  )
  experiments = {}
  for name, untie in UNTIED.items():
    model = MixtureOfTransformersConfig(
      dim=128, num_layers=4, num_heads=4, ffn_dim=512, untie=untie
    )
    experiments[name] = to_mapping(dataclasses.replace(base, model=model))
  return ConfigDict(
    {"control": "dense", "seeds": (0, 1, 2), "experiments": experiments}
  )
