r"""LMFusion in small: what learning pictures costs a text model, by what is trained.

Paper: Shi et al., "LMFusion" (arXiv 2412.15188), section 5.1 and Figure 3, over steps of
the same FLOPs: dense fine-tuning of the text model loses text, a dense model whose text
is frozen loses pictures, and separating attention as well as feed-forward ("deep") is no
worse than feed-forward alone ("shallow"); text rates of 0.1 and 1 of pictures' rate lose
text again.

  python -m experiments.compare --config=configs/compare_lmfusion.py
  python -m experiments.compare --config=configs/compare_lmfusion.py:40 --workdir=runs/quick

`text_model` is trained on Factbook passages and captions; the six others start from it,
of the same seed, and see captioned pictures and next to no passages, as the paper's do:

  dense_finetuned   nothing separated, everything learns at the rate of pictures
  dense_frozen      nothing separated, only the patches and the picture's id learn
  shallow_frozen    feed-forward separated, text frozen
  deep_frozen       everything separated, text frozen: LMFusion
  deep_tenth        everything separated, text learns at a tenth of the rate
  deep_finetuned    everything separated, text learns at the rate of pictures

Compared are text (held-out passages, those of `text_model` too), captions behind their
pictures, and the denoising loss of pictures, in the same steps of the same FLOPs; linear
patches. d=128, 4 layers, 4 heads, SwiGLU 512 wide; rows of 384, 5 a step, AdamW at a
constant rate, three seeds. A run takes about two minutes on 2 CPU cores.

Expect frozen text to score what `text_model` does (4.11 nats a token) and fine-tuned text
0.5 to 0.6 more; of pictures 0.316 deep, 0.339 shallow, 0.423 dense with text frozen, 0.337
dense with all trained (experiments/results/lmfusion/compare_lmfusion.md).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import mot_transfusion
from fusionlab.config import to_mapping
from fusionlab.data.config import SourceConfig
from fusionlab.evaluate.config import EvaluateConfig
from fusionlab.experiment import Experiment
from fusionlab.models.lmfusion import LMFusionConfig
from fusionlab.train.config import InitConfig, OptimizerConfig, TrainConfig
from fusionlab.train.text_first import text_model

TEXT_MODEL = "text_model"
_FROZEN = {"freeze": "text shared"}
_TENTH = {"learning_rate_of": "text:0.1 shared:0.1"}
# Name -> (config.model.untie; None: everything, changes of config.optimizer).
VARIANTS: dict[str, tuple[str | None, dict[str, str]]] = {
  "dense_finetuned": ("", {}),
  "dense_frozen": ("", _FROZEN),
  "shallow_frozen": ("ffn ffn_norm", _FROZEN),
  "deep_frozen": (None, _FROZEN),
  "deep_tenth": (None, _TENTH),
  "deep_finetuned": (None, {}),
}


def get_config(num_steps: str = "100") -> ConfigDict:
  """Returns the comparison: experiments by name, control and seeds.

  Args:
    num_steps: optimizer steps of every run with pictures; `text_model` takes three
      times as many.
  """
  steps = int(num_steps)
  pictures = _with_pictures(steps)
  # Its own data: all passages, in an epoch in which captions come as often.
  first = dataclasses.replace(
    pictures,
    data=dataclasses.replace(pictures.data, sources=_sources(passages=1.0)),
    optimizer=dataclasses.replace(pictures.optimizer, learning_rate=3e-3),
    init=InitConfig(text_steps=3 * steps),
  )
  experiments = {TEXT_MODEL: to_mapping(text_model(first))}
  for name, (untie, changes) in VARIANTS.items():
    model, optimizer = pictures.model, pictures.optimizer
    if untie is not None:
      model = dataclasses.replace(model, untie=untie)
    optimizer = dataclasses.replace(optimizer, **changes)
    experiments[name] = to_mapping(
      dataclasses.replace(
        pictures,
        model=model,
        optimizer=optimizer,
        init=InitConfig(checkpoint=TEXT_MODEL, add_towers="image:text"),
      )
    )
  return ConfigDict(
    {
      "control": "dense_finetuned",
      "seeds": (0, 1, 2),
      "metrics": (
        "eval/heldout_place/loss/text",
        "eval/heldout_style/caption_nll_per_token",
        "eval/heldout_picture/caption_nll_per_token",
      ),
      "experiments": experiments,
    }
  )


def _with_pictures(steps: int) -> Experiment:
  given = Experiment.from_mapping(mot_transfusion.get_config().to_dict())
  return dataclasses.replace(
    given,
    model=LMFusionConfig(
      dim=128, num_layers=4, num_heads=4, ffn_dim=512, patches="linear"
    ),
    data=dataclasses.replace(given.data, sources=_sources(passages=0.02)),
    optimizer=OptimizerConfig(
      learning_rate=2e-3, schedule="constant", warmup_steps=20, b2=0.95
    ),
    train=TrainConfig(
      batch_size=5,
      num_steps=steps,
      log_every=50,
      eval_every=max(steps // 4, 1),
      eval_batches=2,
      checkpoint_every=0,
      keep_checkpoints=1,
    ),
    evaluate=EvaluateConfig(examples=64, drawn=0, matched=0, grid=0, bank=1),
  )


def _sources(passages: float) -> dict[str, SourceConfig]:
  """Emoji in 0.6 of the groups, and passages; no flags.

  So the held-out places, which both sources have in configs/mot_chameleon.py, are
  passages alone.
  """
  return {
    "openmoji": SourceConfig(kind="openmoji", path="0.6", weight=2.0),
    "factbook": SourceConfig(kind="factbook", weight=passages),
  }
