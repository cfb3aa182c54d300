r"""Mixture-of-Transformers in the Transfusion setting (text and continuous pictures).

Papers: Zhou et al., "Transfusion" (arXiv 2408.11039), section 3 and Table 2; with
towers Liang et al., "Mixture-of-Transformers" (arXiv 2411.04996), section 3.4, sizes,
batch and steps from its Table 1. Their comparison is Figures 10 to 12: steps to equal
loss of MoT against the dense model, at equal FLOPs per step.

  python -m experiments.run --config=configs/mot_transfusion.py
  python -m experiments.run --config=configs/mot_transfusion.py:7b --mode=summary
  python -m experiments.run --config=configs/mot_transfusion.py \
      --config.model.untie='' --workdir=runs/dense_transfusion   # the dense control

`tiny` (default): the pictures, captions and passages of configs/mot_chameleon.py, flags
seen twice as often as emoji; each picture 16 x 16 latents of the KL autoencoder in the
package (configs/kl_openmoji.py), 64 patches of 2 x 2 that enter and leave by a matrix
(`--config.model.patches=unet`: by the halves of a small U-Net, a third slower). Predicted
is rectified flow's velocity (`--config.model.process=ddpm`: the paper's noise): DDPM's
loss all but ignores what a caption decides, the first steps of a drawing. On flags alone
the own picture had median rank 6 of 236 after 300 steps of flow, 88 after 400 of DDPM.

On 2 CPU cores the command takes 9 minutes, six of them training (482 of the 550 steps;
commit cee92b8, seed 0). Expect a held-out denoising loss of 0.72, of which captions save
0.03 (of flags 0.40 and 0.18), and 4.46 nats a token of text. It draws flags, colour
pictures and line drawings as asked, and flags in colours of theirs, but not yet which
one: the own picture has median rank 242 of 1,608 (chance 804).

The paper's sizes (163m 760m 1.4b 7b; `1_4b` is the same as `1.4b`) keep its rows of
4,096 tokens, batch, steps, 32,000 ids, U-Net and optimizer: AdamW at 3e-4, 4,000
warm-up steps, cosine to 1.5e-5 (Transfusion, section 4.1). The paper's data is not
public: bring your own by `config.data.sources`.

What differs from the paper: the data, the autoencoder (theirs has 86M parameters and 8
channels, and was trained with LPIPS, GAN and ID losses too), captions are dropped for
guidance in 10% of the documents (theirs is not stated; 5% at `tiny`, whose groups then
fill), and at `tiny` the process, the size, the vocabulary, rows of 384 tokens, Muon and
the schedule.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import mot_chameleon
from fusionlab.config import to_mapping
from fusionlab.data.config import DataConfig
from fusionlab.errors import UserError, nearest
from fusionlab.evaluate.config import EvaluateConfig
from fusionlab.experiment import Experiment
from fusionlab.models.transfusion import SIZES, TransfusionConfig
from fusionlab.objectives.diffusion import NextTokenDiffusionConfig
from fusionlab.sharding.mesh import MeshConfig
from fusionlab.train.config import OptimizerConfig, TrainConfig


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
      f"unknown size {size!r} of"
      f" mot_transfusion{nearest(size, ('tiny', *SIZES))}"
    )
  experiment = _tiny() if size == "tiny" else _paper(size)
  return ConfigDict(to_mapping(experiment))


def _tiny() -> Experiment:
  discrete = Experiment.from_mapping(mot_chameleon.get_config().to_dict())
  # Six minutes of denoising teach less than eight of codes do; flags are few.
  weights = {"openmoji": 6.0, "flags": 12.0, "factbook": 0.28}
  sources = {
    name: dataclasses.replace(source, weight=weights[name])
    for name, source in discrete.data.sources.items()
  }
  return Experiment(
    model=TransfusionConfig(dim=192, num_layers=4, num_heads=6, process="flow"),
    objective=NextTokenDiffusionConfig(),
    data=dataclasses.replace(
      discrete.data, sources=sources, image_tokenizer="kl", image_first=0.2
    ),
    optimizer=discrete.optimizer,
    train=TrainConfig(batch_size=5, num_steps=550, max_seconds=360.0),
    evaluate=EvaluateConfig(
      examples=64,
      drawn=24,
      matched=12,
      grid=4,
      num_samples=2,
      guidance=2.0,
      diffusion_steps=20,
    ),
  )


def _paper(name: str) -> Experiment:
  size = SIZES[name]
  return Experiment(
    model=TransfusionConfig(
      dim=size.dim,
      num_layers=size.num_layers,
      num_heads=size.num_heads,
      vocab_size=32_000,
      patches="unet",
      unet_channels=672,  # 0.27B parameters, as in the paper
      remat="full",
    ),
    objective=NextTokenDiffusionConfig(),
    data=DataConfig(
      sources=mot_chameleon.SOURCES,
      image_tokenizer="kl",
      row_length=4096,
      image_first=0.2,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-4,
      schedule="cosine",
      warmup_steps=4000,
      final_fraction=0.05,
      b2=0.95,
    ),
    train=TrainConfig(
      batch_size=size.batch_rows,
      num_steps=size.num_steps,
      eval_every=1000,
      checkpoint_every=1000,
    ),
    mesh=MeshConfig(preset="auto"),
  )
