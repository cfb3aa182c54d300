r"""Transfusion in small: MoT against dense, spans against causal, U-Net against linear.

Papers: Zhou et al., "Transfusion" (arXiv 2408.11039): pictures whose patches see each
other against causal ones, FID 20.3 against 61.3 with linear patches and 16.8 against
16.7 with a U-Net (Table 5, 0.76B); U-Net against linear patches, FID 18.8 against 37.6
at 0.16B and 16.0 against 18.6 at 7B (Table 7). Liang et al., "Mixture-of-Transformers"
(arXiv 2411.04996, Figures 10 to 12): s, the steps MoT needs for the dense model's loss
over the dense model's steps, is 0.25 for images and 0.98 for text at 163M.

  python -m experiments.compare --config=configs/compare_transfusion.py
  python -m experiments.compare --config=configs/compare_transfusion.py:40 --workdir=runs/quick

`dense`, `mot`, `mot_causal` (spans causal) and `mot_unet`, three seeds, on the data of
configs/mot_transfusion.py at d=128, 4 layers, 4 heads, SwiGLU 512 wide; rows of 384, 5
a step, a constant rate. No FID: what is compared is the held-out denoising loss, at the
same five noise levels and the same noise for all. A run takes two to three minutes on 2
CPU cores. Expect the paper's signs: 0.291 dense, 0.282 MoT, 0.298 causal, 0.266 U-Net,
in every seed (experiments/results/mot_transfusion/compare_transfusion.md). The U-Net's
own FLOPs come on top of the count, which is why `config.equal_flops` is off; steps
compare, hours do not.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import mot_transfusion
from fusionlab.config import to_mapping
from fusionlab.experiment import Experiment
from fusionlab.models.transfusion import TransfusionConfig
from fusionlab.train.config import OptimizerConfig, TrainConfig

VARIANTS = {
  "dense": {"untie": ""},
  "mot": {},
  "mot_causal": {"causal": True},
  "mot_unet": {"patches": "unet"},
}


def get_config(num_steps: str = "150") -> ConfigDict:
  """Returns the comparison: experiments by name, control and seeds.

  Args:
    num_steps: optimizer steps of every run.
  """
  base = Experiment.from_mapping(mot_transfusion.get_config().to_dict())
  base = dataclasses.replace(
    base,
    optimizer=OptimizerConfig(
      learning_rate=3e-3, schedule="constant", warmup_steps=30, b2=0.95
    ),
    train=TrainConfig(
      batch_size=5,
      num_steps=int(num_steps),
      log_every=50,
      eval_every=max(int(num_steps) // 6, 1),
      eval_batches=2,
      checkpoint_every=0,
      keep_checkpoints=1,
    ),
  )
  base = dataclasses.replace(
    base, evaluate=dataclasses.replace(base.evaluate, after_training=False)
  )
  experiments = {}
  for name, changes in VARIANTS.items():
    model = TransfusionConfig(
      dim=128, num_layers=4, num_heads=4, ffn_dim=512, **changes
    )
    experiments[name] = to_mapping(dataclasses.replace(base, model=model))
  return ConfigDict(
    {
      "control": "dense",
      "seeds": (0, 1, 2),
      "equal_flops": False,
      "experiments": experiments,
    }
  )
