"""What a config means, in checked-in text: a refactor shows what it moved.

`UPDATE_GOLDENS=1 pytest tests/test_goldens.py` rewrites the files; read the diff
before committing it.
"""

import difflib
import os
import pathlib

import jax
import numpy as np
import pytest

from configs import (
  kl_openmoji,
  lmfusion,
  mot_chameleon,
  mot_transfusion,
  vq_openmoji,
)
from fusionlab.batch import LatentGrid, Vocabulary
from fusionlab.config import flatten, from_mapping, to_mapping
from fusionlab.experiment import Experiment
from fusionlab.models import (
  build_model,
  mixture_of_transformers,
  transfusion,
)
from fusionlab.tokenizers.recipe import Recipe
from fusionlab.train.optimizer import decay_mask, path_name

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIGS = {
  "mot_chameleon": (
    mot_chameleon.get_config,
    ("tiny", *mixture_of_transformers.SIZES),
  ),
  "mot_transfusion": (
    mot_transfusion.get_config,
    ("tiny", *transfusion.SIZES),
  ),
  "lmfusion": (lmfusion.get_config, ("tiny",)),
}
CASES = [(name, size) for name, (_, sizes) in CONFIGS.items() for size in sizes]
RECIPES = {
  "kl_openmoji": kl_openmoji.get_config,
  "vq_openmoji": vq_openmoji.get_config,
}
DENSE_TINY = ("mot_chameleon", "tiny_dense")


def experiment_of(name: str, size: str) -> Experiment:
  get_config, _ = CONFIGS[name]
  mapping = get_config(size.removesuffix("_dense")).to_dict()
  if size.endswith("_dense"):
    mapping["model"]["untie"] = ""
  return Experiment.from_mapping(mapping)


def model_of(experiment: Experiment):
  # The packaged tokenizers' ranges, where the config leaves the size to them.
  latent = experiment.data.image_tokenizer == "kl"
  text = (experiment.model.vocab_size or 4096) - 512
  vocabulary = Vocabulary(
    modalities=("text", "image"),
    sizes=(text, 1 if latent else 512),
    grids=(None, LatentGrid(side=16, channels=4, patch=2)) if latent else (),
  )
  return build_model(experiment.model, vocabulary)


def axes_by_path(tree) -> dict[str, tuple]:
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: isinstance(x, tuple)
  )
  return {path_name(path): axes for path, axes in leaves}


def describe_config(name: str, size: str) -> str:
  flat = flatten(CONFIGS[name][0](size).to_dict())
  return "".join(f"{key} = {flat[key]!r}\n" for key in sorted(flat))


def describe_parameters(experiment: Experiment, size: str) -> str:
  """One line per parameter: path, shape, dtype, axes; tiny adds mean and std."""
  model = model_of(experiment)
  shapes = model.abstract_params()
  axes = axes_by_path(model.param_axes())
  measured = {}
  if size.startswith("tiny"):
    values = jax.jit(model.init_params)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
      leaf = np.asarray(leaf, np.float64)
      # Two digits: enough to see another initialiser, not another XLA.
      mean = round(leaf.mean(), 2) + 0.0
      measured[path_name(path)] = f" mean {mean:.2f} std {leaf.std():.1e}"
  lines, total = [], 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    name = path_name(path)
    total += int(np.prod(leaf.shape))
    lines.append(
      f"{name} {leaf.dtype}{list(leaf.shape)} {'/'.join(axes[name])}"
      f"{measured.get(name, '')}\n"
    )
  return "".join(sorted(lines)) + f"total {total:,}\n"


def describe_decay(experiment: Experiment) -> str:
  model = model_of(experiment)
  shapes = model.abstract_params()
  mask = decay_mask(experiment.optimizer, shapes)
  rate = experiment.optimizer.weight_decay
  return "".join(
    f"{name} {rate if mask[name] else 0.0}\n" for name in sorted(mask)
  )


def compare(path: pathlib.Path, text: str) -> None:
  if os.environ.get("UPDATE_GOLDENS") == "1":
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return
  old = path.read_text(encoding="utf-8") if path.exists() else ""
  diff = difflib.unified_diff(
    old.splitlines(),
    text.splitlines(),
    f"{path.name} (golden)",
    "now",
    n=0,
    lineterm="",
  )
  assert old == text, "UPDATE_GOLDENS=1 rewrites it:\n" + "\n".join(diff)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_config_dump(name, size):
  text = describe_config(name, size)
  compare(GOLDENS / f"{name}_{size}" / "config.txt", text)


@pytest.mark.parametrize(("name", "size"), [*CASES, DENSE_TINY])
def test_parameters_axes_and_initialisers(name, size):
  text = describe_parameters(experiment_of(name, size), size)
  compare(GOLDENS / f"{name}_{size}" / "parameters.txt", text)


@pytest.mark.parametrize(("name", "size"), [*CASES, DENSE_TINY])
def test_decay_of_each_parameter(name, size):
  text = describe_decay(experiment_of(name, size))
  compare(GOLDENS / f"{name}_{size}" / "decay.txt", text)


@pytest.mark.parametrize("name", RECIPES)
def test_tokenizers_recipe(name):
  recipe = from_mapping(Recipe, RECIPES[name]().to_dict())
  keys = flatten(to_mapping(recipe))
  text = "".join(f"{key} = {keys[key]!r}\n" for key in sorted(keys))
  compare(GOLDENS / name / "config.txt", text)


def test_no_golden_is_left_over():
  known = {f"{name}_{size}" for name, size in [*CASES, DENSE_TINY]}
  known |= RECIPES.keys()
  assert {p.name for p in GOLDENS.iterdir() if p.is_dir()} == known
