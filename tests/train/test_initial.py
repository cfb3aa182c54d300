"""A trained model grows by a tower, and what it knew stays bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import fusionlab
from configs import mot_from_llama
from fusionlab.batch import batch_of_ids
from fusionlab.errors import ConfigError, UserError
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.tokenizers import (
  TextTokenizer,
  load_tokenizers,
  make_tokenizers,
)
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train import loop, setup
from fusionlab.train.config import InitConfig
from fusionlab.train.initial import add_tower, drawing, grown_params
from fusionlab.train.optimizer import named_leaves
from tests.models import tiny
from tests.train import fakes
from tests.train.test_partition import Parts

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_v1"


def grown_model():
  """A two-tower model, and the three-tower model grown from it."""
  old, params = tiny.make(2)
  grown = add_tower(
    params, "speech", init_from="text", num_ids=40, key=jax.random.key(7)
  )
  return old, params, tiny.make(3)[0], grown


def documents(seed=0):
  """Two documents of text and image ids."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 80, 20).tolist() for _ in range(2)]


def test_an_added_tower_is_a_copy_and_the_rest_is_as_it_was():
  _, params, model, grown = grown_model()
  shapes = model.abstract_params()
  new, old = named_leaves(grown), named_leaves(params)
  assert {n: a.shape for n, a in new.items()} == {
    n: a.shape for n, a in named_leaves(shapes).items()
  }
  for name, leaf in new.items():
    if name in ("embed", "unembed"):
      axis = 0 if name == "embed" else 1
      np.testing.assert_array_equal(np.take(leaf, range(80), axis), old[name])
      rows = np.take(leaf, range(80, 120), axis)
      assert np.std(rows) == pytest.approx(32**-0.5, rel=0.1)
    else:
      source = name.replace("/speech/", "/text/")
      np.testing.assert_array_equal(leaf, old[source])
  assert "speech" not in params["final_norm"]  # the argument is not changed


def test_old_towers_outputs_are_bit_identical():
  """In one layout: right after growing, and after training the new tower."""
  old, params, model, grown = grown_model()
  parts = Parts(
    model=(model, grown), freeze="text image", weight_decay=0.5, no_decay=""
  )
  later = parts.after(steps=2)[0].params
  change = later["final_norm"]["speech"]["scale"] - 1
  assert np.abs(change - (grown["final_norm"]["speech"]["scale"] - 1)).max() > 0
  ids = documents()
  before = batch_of_ids(ids, old.vocabulary, towers=(0, 1))
  counts = (*np.bincount(np.ravel(ids) // 40, minlength=2).tolist(), 0)
  after = batch_of_ids(ids, model.vocabulary, towers=(0, 1, 2), counts=counts)

  @jax.jit
  def run(params):
    hidden = model.apply({"params": params}, after)
    return hidden, model.logits(params, hidden)[..., :80]

  hidden = tiny.apply(old, params, before)
  (at_once, logits), (trained, later_logits) = run(grown), run(later)
  np.testing.assert_array_equal(hidden, at_once)
  np.testing.assert_array_equal(hidden, trained)
  np.testing.assert_array_equal(logits, later_logits)
  # The old table is narrower, so its product may be summed otherwise.
  np.testing.assert_allclose(
    logits, old.logits(params, hidden), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"name": "speech", "init_from": "txt"}, "did you mean 'text'"),
    ({"name": "image", "init_from": "text"}, "'image' already"),
    ({"name": "a", "init_from": "text", "num_ids": 3}, "need a key"),
  ],
)
def test_mistakes_of_add_tower(options, said):
  _, params = tiny.make(2)
  with pytest.raises(UserError, match=said):
    add_tower(params, **options)


def test_copied_towers_begin_alike_and_nothing_else_changes():
  model, _ = tiny.make(3)
  key = jax.random.key(0)
  plain = jax.jit(model.init_params)(key)
  draw = drawing(InitConfig(copy_towers="image:text"), model)
  copied = jax.jit(draw)(key)
  old, new = named_leaves(plain), named_leaves(copied)
  for name in old:
    source = name.replace("/image/", "/text/")
    np.testing.assert_array_equal(new[name], old[source])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a trained model `base`; data is drawn."""
  folder = tmp_path_factory.mktemp("initial")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setup, "open_data", fakes.open_fake_data)
    train(folder, "base")
    yield folder


DENSE = {"model__untie": ""}


def train(folder, name, **flat):
  experiment = fakes.experiment_of(folder, train__num_steps=4, **flat)
  assert loop.train(experiment, str(folder / name)) == 0
  return checkpoints.load(folder / name)


def first_loss(folder, name):
  line = (folder / name / "metrics.jsonl").read_text().splitlines()[0]
  return json.loads(line)["train/loss"]


@pytest.mark.smoke
def test_a_run_starts_from_a_checkpoint_by_config(folder):
  """A dense model becomes towers: the same function, then frozen text stays."""
  dense = train(folder, "dense", **DENSE)
  start = str(folder / "dense")
  again = train(folder, "again", init__checkpoint=start, **DENSE)
  towers = train(
    folder,
    "towers",
    init__checkpoint=start,
    optimizer__freeze="text",
    optimizer__ema_decay=0.9,
  )
  assert first_loss(folder, "towers") == pytest.approx(
    first_loss(folder, "again"), rel=1e-5
  )
  assert first_loss(folder, "again") < first_loss(folder, "dense")
  old, new = named_leaves(dense.params), named_leaves(towers.params)
  for name, leaf in new.items():
    if "/text/" in name:
      source = name.replace("/text/", "/shared/")
      np.testing.assert_array_equal(leaf, old[source])
      np.testing.assert_array_equal(leaf, named_leaves(towers.ema)[name])
  assert again.step == 4
  # A resumed run does not look at the checkpoint it started from.
  (folder / "dense").rename(folder / "moved")
  experiment = fakes.experiment_of(
    folder,
    train__num_steps=6,
    init__checkpoint=start,
    optimizer__freeze="text",
    optimizer__ema_decay=0.9,
  )
  assert loop.train(experiment, str(folder / "towers")) == 0
  assert checkpoints.load(folder / "towers").step == 6


def test_a_start_on_several_devices(folder):
  """Frozen rows of tables, moments and gradients sharded: the same numbers."""
  start = str(folder / "base")
  options = {"init__checkpoint": start, "optimizer__freeze": "text"}
  one = train(folder, "one", **options)
  two = train(folder, "two", mesh__fsdp=2, data__group_rows=2, **options)
  assert first_loss(folder, "two") == pytest.approx(
    first_loss(folder, "one"), rel=1e-5
  )
  tiny.close(one.params, two.params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("flat", "said"),
  [
    ({"init__checkpoint": "nowhere"}, "nowhere"),
    ({"model__dim": 32}, r"config.model.dim: 16 there, 32 here"),
    ({"model__norm_placement": "pre"}, "'swin' there, 'pre' here"),
    ({"model__untie": "ffn"}, "has 12 parameters|has no parameter"),
    ({"init__add_towers": "speech:text"}, "no tower 'speech'"),
    ({"init__add_towers": "image"}, "not of the form"),
    ({"init__add_towers": "image:text"}, "has a tower 'image' already"),
    ({"init__add_towers": "image:text text:image"}, "which is itself new"),
    ({"init__add_towers": "image:image"}, "names 'image' twice"),
    ({"model__tie_embeddings": True}, "no place for, first unembed"),
  ],
)
def test_mistakes_of_a_start_are_named(folder, tmp_path, flat, said):
  flat = {"init__checkpoint": str(folder / "base")} | flat
  with pytest.raises(UserError, match=said):
    train(folder, tmp_path / "new", **flat)


def test_keys_that_need_each_other(tmp_path):
  with pytest.raises(ConfigError, match="no tower 'random'"):
    fakes.experiment_of(tmp_path, init__copy_towers="image:random")
  with pytest.raises(ConfigError, match="copy_towers is for new parameters"):
    InitConfig(add_towers="a:b").check("config.init")
  with pytest.raises(ConfigError, match=r"use config\.init\.add_towers"):
    InitConfig(copy_towers="a:b", checkpoint="x").check("config.init")


def test_a_pretrained_text_model_gets_an_image_tower(tmp_path):
  """configs/mot_from_llama.py: its sizes and its text, bit for bit."""
  text = make_tokenizers(TextTokenizer.train(["a"], 261))
  mapping = {
    "model": {
      "kind": "transformer", "modalities": ("text",), "towers": (0,),
      "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
      "ffn_dim": 24, "norm_placement": "pre", "qk_norm": "none",
      "rope_base": 5e5, "tie_embeddings": True,
    },
    "objective": {"kind": "next_token"},
    "data": {"sources": {"a": {"kind": "jsonl"}}},
  }  # fmt: skip
  before = Experiment.from_mapping(mapping)
  base = build_model(before.model, text.vocabulary)
  old = jax.jit(base.init_params)(jax.random.key(3))
  checkpoints.save_model(tmp_path / "llama", before, old, text)
  experiment = Experiment.from_mapping(
    mot_from_llama.get_config(str(tmp_path / "llama")).to_dict()
  )
  tokenizers = load_tokenizers(experiment.data.text_tokenizer)
  model = build_model(experiment.model, tokenizers.vocabulary)
  key = jax.random.key(4)
  grown = grown_params(experiment.init, model, tokenizers, key)
  theirs = named_leaves(old)
  for name, leaf in named_leaves(grown).items():
    if name == "embed":
      np.testing.assert_array_equal(leaf[:261], theirs[name])
    else:
      parts = [
        "shared" if p in ("text", "image") else p for p in name.split("/")
      ]
      np.testing.assert_array_equal(leaf, theirs["/".join(parts)])
  ids = documents()
  here = batch_of_ids(ids, text.vocabulary, towers=(0,))
  there = batch_of_ids(ids, tokenizers.vocabulary, towers=(0, 1))
  tiny.close(
    tiny.apply(base, old, here), tiny.apply(model, grown, there), atol=1e-5
  )
  with pytest.raises(UserError, match="grows a model of text alone"):
    mot_from_llama.get_config(str(FIXTURE))
  with pytest.raises(UserError, match=r"fusionlab\.interop import"):
    mot_from_llama.get_config(str(tmp_path / "none"))


def test_add_tower_is_public():
  assert fusionlab.add_tower is add_tower
