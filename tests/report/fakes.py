"""A workdir as a run leaves it, small and made without training."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from fusionlab.config import to_mapping
from fusionlab.data.config import DataConfig, SourceConfig
from fusionlab.experiment import Experiment
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.models.transfusion import TransfusionConfig
from fusionlab.objectives.diffusion import NextTokenDiffusionConfig
from fusionlab.train.config import TrainConfig
from fusionlab.train.workdir import write_json, write_status
from fusionlab.train.writers import Writers

SPLITS = ("heldout_style", "heldout_picture")
EVIL = "<script>alert(1)</script>\"' onerror='x"


def experiment(**model: Any) -> Experiment:
  return Experiment(
    model=MixtureOfTransformersConfig(dim=32, num_heads=2, **model),
    data=DataConfig(sources={"openmoji": SourceConfig(weight=2.0)}),
    train=TrainConfig(batch_size=4, num_steps=40),
  )


def metric_row(step: int, speed: bool = True) -> dict[str, float]:
  row = {
    "train/loss": 9 - step / 10,
    "train/loss/text": 8.8 - step / 10,
    "train/loss/image": 9.1 - step / 10,
    "train/grad_norm": 1.5,
    "train/learning_rate": 3e-3,
  }
  if speed:
    row |= {
      "perf/step_s": 0.5,
      "perf/tokens_per_s": 4000.0,
      "perf/data_wait": 0.01,
    }
  return row


def eval_row(step: int) -> dict[str, float]:
  row = {"perf/eval_s": 3.0}
  for prefix in ("eval/", *(f"eval/{split}/" for split in SPLITS)):
    row |= {
      f"{prefix}loss/text": 7 - step / 20,
      f"{prefix}loss/image": 6 - step / 20,
      f"{prefix}caption_nats_per_picture": 0.5,
    }
  return row


def write_metrics(folder: pathlib.Path, names: str = "csv jsonl") -> None:
  writers = Writers(names, folder)
  writers.write(1, metric_row(1, speed=False))
  for step in range(10, 41, 10):
    writers.write(step, metric_row(step))
    if step in (20, 40):
      writers.write(step, eval_row(step))
  writers.close()


def picture(path: pathlib.Path, seed: int = 0, size: int = 16) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3))
  Image.fromarray(pixels.astype(np.uint8)).save(path)


def entry(folder: pathlib.Path, split: str, index: int, caption: str) -> dict:
  names = [
    f"{split}/{index}_{part}.png" for part in ("picture", "tokens", 0, 1)
  ]
  for seed, name in enumerate(names):
    picture(folder / name, seed + 10 * index)
  return {
    "key": f"{split}/{index}",
    "caption": caption,
    "picture": names[0],
    "reconstruction": names[1],
    "generated": names[2:],
    "ranks": [1, 17 + index],
  }


def write_samples(folder: pathlib.Path, caption: str = "red apple") -> dict:
  samples = folder / "samples"
  grids = {
    split: [entry(samples, split, i, f"{caption} {i}") for i in range(3)]
    for split in ("train", *SPLITS)
  }
  held = grids["heldout_picture"]
  likely = [{**e, "nll_per_code": 1.0 + i} for i, e in enumerate(held)]
  content = {
    "step": 40,
    "seconds": 3.0,
    "settings": {"temperature": 0.3, "top_k": 16, "num_samples": 2},
    "bank": 3511,
    "grids": grids,
    "described": {
      "heldout_picture": [{**e, "generated": ["a pear", ""]} for e in held]
    },
    "likelihood": {
      "heldout_picture": {"most": likely[:1], "least": likely[1:]}
    },
  }
  write_json(samples / "samples.json", content)
  return content


def write_evaluation(folder: pathlib.Path) -> dict:
  metrics = {k: v for k, v in eval_row(40).items() if k[:5] == "eval/"}
  for split in SPLITS:
    metrics[f"eval/{split}/caption_to_image/top1"] = 0.41
  for split in ("train", *SPLITS):
    metrics[f"eval/{split}/own_picture/top1"] = 0.125
    metrics[f"eval/{split}/own_picture/median_rank"] = 17.5
  content = {
    "step": 40,
    "checkpoint": "checkpoints/40",
    "metrics": metrics,
    "intervals": {name: [v - 0.1, v + 0.1] for name, v in metrics.items()},
    "counts": dict.fromkeys(metrics, 256),
    "chance": {n: 1 / 3511 for n in metrics if n.endswith("own_picture/top1")},
    "resamples": 1000,
    "seed": 0,
  }
  write_json(folder / "evaluation.json", content)
  return content


def write_continuous_run(folder: pathlib.Path) -> pathlib.Path:
  """A finished run whose pictures are latents."""
  config = Experiment(
    model=TransfusionConfig(dim=32, num_heads=2),
    objective=NextTokenDiffusionConfig(),
    data=DataConfig(sources={"openmoji": SourceConfig()}, image_tokenizer="kl"),
  )
  write_run(folder, config)
  for name in ("metrics.csv", "metrics.jsonl"):
    (folder / name).unlink()
  writers = Writers("csv", folder)
  for step in (20, 40):
    row = {"train/loss": 4.0, "train/loss/text": 3.0, "train/loss/image": 0.5}
    for split in ("", *(f"{split}/" for split in SPLITS)):
      row |= {
        f"eval/{split}loss": 5.0 - step / 40,
        f"eval/{split}loss/text": 3.0,
        f"eval/{split}loss/image": 0.62,
        f"eval/{split}mse/image/t0.1": 0.9 - step / 100,
        f"eval/{split}mse/image/t0.9": 0.06,
        f"eval/{split}caption_mse_gain": 0.01,
        f"eval/{split}pictures": 3.5,
      }
    writers.write(step, row)
  writers.close()
  metrics = {k: v for k, v in row.items() if k.startswith("eval/")}
  metrics["eval/train/image_denoising_mse"] = 0.33
  intervals = {"eval/train/image_denoising_mse": [0.32, 0.34]}
  intervals["eval/heldout_style/loss/image"] = [0.61, 0.63]
  evaluation = {"step": 40, "metrics": metrics, "intervals": intervals}
  write_json(folder / "evaluation.json", evaluation)
  path = folder / "samples" / "samples.json"
  content = json.loads(path.read_text())
  (entry,) = content["likelihood"]["heldout_picture"]["most"]
  steps = [
    {"step": step, "picture": name}
    for step, name in zip((3, 9, 12), entry["generated"] * 2, strict=False)
  ]
  strip = {"key": entry["key"], "caption": entry["caption"], "steps": steps}
  content |= {
    "loss": "denoising_mse",
    "strips": {"heldout_picture": [strip]},
    "likelihood": {"train": {"most": [entry | {"denoising_mse": 0.125}]}},
  }
  write_json(path, content)
  meta = {
    "vocabulary": {"text": [0, 3584], "image": [3584, 3585]},
    "parameters": {
      "embed": {"shape": [3585, 32]},
      "layers/ffn/text/w_in": {"shape": [4, 32, 64]},
      "layers/ffn/image/w_in": {"shape": [4, 32, 64]},
      "patches/image/w_in": {"shape": [16, 32]},
    },
  }
  write_json(folder / "checkpoints" / "40" / "meta.json", meta)
  return folder


def write_run(
  folder: pathlib.Path,
  config: Experiment | None = None,
  caption: str = "red apple",
) -> pathlib.Path:
  """A finished run, scored and sampled."""
  folder.mkdir(parents=True)
  write_json(folder / "config.json", to_mapping(config or experiment()))
  write_json(
    folder / "environment.json",
    {
      "python": "3.11.7",
      "packages": {"jax": "0.10.2"},
      "devices": {
        "platform": "gpu", "kind": "NVIDIA H100", "count": 2, "processes": 1
      },
      "host": {"platform": "Linux", "machine": "x86_64", "cpus": 2},
      "command": ["python", "-m", "experiments.run", "--config.model.untie="],
      "commit": "1a53384e305198eaacdb3a9e147042333fc8ba32+",
    },
  )  # fmt: skip
  write_status(folder, "finished", 40, "num_steps")
  write_metrics(folder)
  checkpoint = folder / "checkpoints" / "40"
  checkpoint.mkdir(parents=True)
  (folder / "checkpoints" / "50").mkdir()
  meta = {"vocabulary": {"text": [0, 3584], "image": [3584, 4096]}}
  (checkpoint / "meta.json").write_text(json.dumps(meta))
  (checkpoint / "checksums.json").write_text("{}")
  write_evaluation(folder)
  write_samples(folder, caption)
  return folder
