"""What the report shows of a model of continuous pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fusionlab.evaluate.config import EvaluateConfig
from fusionlab.evaluate.examples import ExampleScore
from fusionlab.evaluate.pictures import Gallery
from fusionlab.evaluate.results import Results
from fusionlab.evaluate.samples import Shown, write
from fusionlab.experiment import Experiment
from fusionlab.generation.generate import Generated
from fusionlab.models import build_model
from fusionlab.models.transfusion import TransfusionConfig
from fusionlab.tokenizers import TextTokenizer, make_tokenizers
from tests.evaluate.pictures import painted
from tests.tokenizers import test_latents as latents


@pytest.fixture(scope="module")
def gallery():
  """Of four random pictures of 16 x 16 pixels, drawn in five steps."""
  text = TextTokenizer.train(["a"], 261)
  tokenizers = make_tokenizers(text, latents.make())
  config = TransfusionConfig(
    dim=16, num_layers=1, num_heads=2, ffn_dim=16, untie=""
  )
  model = build_model(config, tokenizers.vocabulary)
  evaluate = EvaluateConfig(num_samples=2, diffusion_steps=5)
  experiment = dataclasses.replace(Experiment(model=config), evaluate=evaluate)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
    model.abstract_params(),
  )
  bank = painted(4, tokenizers.vocabulary)
  return Gallery(model, params, tokenizers, experiment, bank), bank


@pytest.fixture(scope="module")
def written(gallery, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  gallery, bank = gallery
  scores = [
    ExampleScore("fake", n, str(n), f"no {n}", 4.0 - n, 4) for n in range(4)
  ]
  shown = Shown.choose(bank, scores, 2)
  write(folder, gallery, {"train": shown, "heldout": shown}, 3)
  return folder / "samples"


def opened(folder, name):
  return np.asarray(Image.open(folder / name))


def test_pictures_come_from_latents(gallery, written):
  """The tokenizer's own, samples, and each split's file."""
  gallery, bank = gallery
  said = json.loads((written / "samples.json").read_text())
  row = said["grids"]["heldout"][1]
  kept = gallery.tokenizers.image.decode(bank[1].latents[None])[0]
  assert (opened(written, row["reconstruction"]) == kept).all()
  first, second = (opened(written, name) for name in row["generated"])
  assert first.shape == kept.shape and (first != second).any()
  assert said["settings"]["diffusion_steps"] == 5
  assert [len(e["generated"]) for e in said["described"]["heldout"]] == [2, 2]


def test_pictures_are_shown_on_their_way(written):
  """Held-out captions' first samples, at steps that are named."""
  said = json.loads((written / "samples.json").read_text())
  assert list(said["strips"]) == ["heldout"]
  rows = said["grids"]["heldout"]
  for strip, row in zip(said["strips"]["heldout"], rows, strict=True):
    assert strip["caption"] == row["caption"]
    assert [one["step"] for one in strip["steps"]] == [2, 3, 4, 5]
    assert strip["steps"][-1]["picture"] == row["generated"][0]
    before = [opened(written, one["picture"]) for one in strip["steps"]]
    assert len({picture.tobytes() for picture in before}) == 4


def test_the_least_error_is_the_likeliest(written):
  said = json.loads((written / "samples.json").read_text())
  assert said["loss"] == "denoising_mse"
  ends = said["likelihood"]["train"]
  errors = [[e[said["loss"]] for e in ends[w]] for w in ("most", "least")]
  assert errors == [[0.25, 0.5, 0.75, 1.0], [1.0, 0.75, 0.5, 0.25]]


def test_codes_that_agree_are_of_codes(gallery, monkeypatch):
  """Retrieval is measured of drawn pictures; agreement is not."""
  gallery, bank = gallery

  def draw(examples):
    pictures = gallery.reconstructed(examples)
    return [
      Generated(n, 0, (), (picture,), "stop")
      for n, picture in enumerate(pictures)
    ]

  monkeypatch.setattr(gallery, "draw", draw)
  results = Results()
  gallery.measure("heldout", bank[:2], results)
  assert results.metrics["eval/heldout/own_picture/top1"] == 1
  assert results.chance["eval/heldout/own_picture/top1"] == 1 / 4
  assert not [name for name in results.metrics if "code" in name]


def test_without_a_grid_nothing_is_drawn(gallery, tmp_path):
  nothing = Shown([], {"most": [], "least": []})
  write(tmp_path, gallery[0], {"heldout": nothing}, 1)
  said = json.loads((tmp_path / "samples" / "samples.json").read_text())
  for kind in ("grids", "strips", "described"):
    assert said[kind] == {"heldout": []}
