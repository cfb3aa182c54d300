"""`python -m fusionlab.tokenizers`: it makes files, or says one line."""

import json
import os
import textwrap

import numpy as np
import pytest
from PIL import Image

from configs import vq_openmoji
from fusionlab.batch import LatentGrid
from fusionlab.config import from_mapping
from fusionlab.data.sources.pictures import square
from fusionlab.errors import UserError
from fusionlab.tokenizers import (
  ImageTokenizer,
  LatentTokenizer,
  TextTokenizer,
  storage,
)
from fusionlab.tokenizers.__main__ import main
from fusionlab.tokenizers.recipe import Recipe, gather_pictures, licence

SOURCE = """
import numpy as np
from fusionlab.data.sources import Example, Part

class Squares:
  def __init__(self, config, name):
    self.size = int(config.path or 16)

  def fingerprint(self):
    return "squares"

  def __len__(self):
    return 12

  def examples(self):
    for i in range(12):
      image = np.full((self.size, self.size, 3), 20 * i, np.uint8)
      yield Example(
        key=f"{i}/{'color' if i % 2 else 'line'}",
        split="heldout" if i < 4 else "train",
        parts=(
          Part("text", (f"square {i}", f"Quadrat {i}") if i >= 4 else ("@@",)),
          Part("image", (image,)),
        ),
      )
"""

CONFIG = """
import ml_collections

def get_config():
  config = ml_collections.ConfigDict()
  config.sources = {"squares": {"kind": "squares:Squares", "path": ""}}
  config.text = {"vocab_size": 263}
  config.image = {
    "image_size": 16, "patch": 4, "codebook_size": 4, "fine_channels": 4,
    "coarse_channels": 4, "encoder_coarse_blocks": 0,
    "decoder_coarse_blocks": 0, "decoder_fine_blocks": 0,
  }
  config.image_train = {"num_steps": 3, "batch_size": 4}
  config.latents = {
    "image_size": 16, "channels": 2, "patch": 2,
    "fine_channels": 4, "coarse_channels": 4,
    "encoder_coarse_blocks": 0, "decoder_coarse_blocks": 0,
    "decoder_fine_blocks": 0,
  }
  config.latent_train = {"num_steps": 3, "batch_size": 4}
  config.licence = "mine"
  return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "squares.py").write_text(textwrap.dedent(SOURCE))
  (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def run(folder, *arguments):
  return main(["tokenizers", f"--config={folder}/config.py", *arguments])


def recipe_of(sources: dict, **settings) -> Recipe:
  """A recipe for pictures of 16 x 16."""
  image = {"image_size": 16, "patch": 4}
  mapping = {"sources": sources, "image": image, **settings}
  return from_mapping(Recipe, mapping)


def test_train_text_writes_the_file_and_its_report(folder, capsys):
  assert run(folder, "train-text", f"--output={folder}/out") == 0
  tokenizer = TextTokenizer.load(str(folder / "out" / "text.json"))
  assert tokenizer.vocab_size == 263
  # Merges come from train texts alone: the held-out "@@" stays two bytes.
  assert len(tokenizer.encode("@@")) == 2
  assert len(tokenizer.encode("square")) < len("square")
  report = json.loads((folder / "out" / "text.report.json").read_text())
  assert report["hash"] == tokenizer.hash
  assert set(report["groups"]) == {"squares/train", "squares/heldout"}
  heldout = report["groups"]["squares/heldout"]
  assert (heldout["texts"], heldout["bytes"], heldout["tokens"]) == (1, 2, 2)
  assert "squares/heldout" in capsys.readouterr().out


def test_train_image_writes_the_file_and_its_report(folder, capsys):
  out = folder / "out"
  flags = ("train-image", f"--output={out}", "--config.image_train.num_steps=4")
  assert run(folder, *flags) == 0
  tokenizer = ImageTokenizer.load(str(out / "image.safetensors"))
  assert tokenizer.codebook_size == 4
  assert tokenizer.notes["training"]["num_steps"] == 4
  assert tokenizer.notes["sources"] == {"squares": "squares"}
  assert tokenizer.notes["licence"] == "mine"
  groups = json.loads((out / "image.report.json").read_text())["groups"]
  assert {g: row["pictures"] for g, row in groups.items()} == {
    "squares/train/line": 4,
    "squares/train/color": 4,
    "squares/heldout/line": 2,
    "squares/heldout/color": 2,
  }
  assert {p.name for p in out.iterdir()} == {
    "image.safetensors",
    "image.report.json",
  }


def test_train_latents_writes_the_file_and_its_report(folder, capsys):
  """And `report` measures the files of all three verbs."""
  out = folder / "out"
  patch = "--config.latents.patch=4"
  assert run(folder, "train-latents", f"--output={out}", patch) == 0
  tokenizer = LatentTokenizer.load(str(out / "latents.safetensors"))
  assert tokenizer.grid == LatentGrid(side=4, patch=4, channels=2)
  assert tokenizer.notes["training"]["kl"] == 1e-6
  assert tokenizer.notes["sources"] == {"squares": "squares"}
  assert tokenizer.notes["licence"] == "mine"
  said = json.loads((out / "latents.report.json").read_text())
  assert said["hash"] == tokenizer.hash
  rows = said["groups"]
  assert rows["squares/heldout/line"]["pictures"] == 2
  # Of all training pictures together the variance is 1.
  kinds = ("line", "color")
  assert min(rows[f"squares/train/{k}"]["std_0"] for k in kinds) <= 1
  assert {p.name for p in out.iterdir()} == {
    "latents.safetensors",
    "latents.report.json",
  }
  for verb in ("train-text", "train-image"):
    run(folder, verb, f"--output={out}")
  capsys.readouterr()
  files = (
    f"--text={out}/text.json",
    f"--image={out}/image.safetensors",
    f"--latents={out}/latents.safetensors",
  )
  assert run(folder, "report", *files) == 0
  said = capsys.readouterr().out
  assert all(name in said for name in ("bytes_per", "perplexity", "std_1"))


@pytest.mark.parametrize(
  ("verb", "file"),
  [
    ("train-image", "image.safetensors"),
    ("train-latents", "latents.safetensors"),
  ],
)
def test_held_out_pictures_do_not_change_the_file(folder, verb, file):
  assert run(folder, verb, f"--output={folder}/one") == 0
  source = folder / "squares.py"
  changed = source.read_text().replace("20 * i", "20 * i if i >= 4 else 7")
  assert changed != source.read_text()
  (folder / "others.py").write_text(changed)
  kind = "--config.sources.squares.kind=others:Squares"
  assert run(folder, verb, f"--output={folder}/two", kind) == 0
  one, two = ((folder / name / file).read_bytes() for name in ("one", "two"))
  assert one == two


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "give one verb"),
    (("train-txt",), "did you mean 'train-text'"),
    (("train-text",), "needs --output=FOLDER"),
    (("train-text", "--outptu=x"), "Did you mean: output"),
    (("report", "--image=none.safetensors"), "there is no file"),
    (("report", "--latents=none.safetensors"), "latent tokenizer: there is no"),
    (("report", "--config.latents.patch=3"), "allowed: 1, 2, 4"),
    (("report", "--config.text.vocab_siz=300"), 'Did you mean "vocab_size"'),
    (("report", "--config.text.vocab_size=many"), "vocab_size=many"),
    (("report", "--config.text.vocab_size=3"), "at least 261"),
    (("report", "--config.image.patch=5"), "is not a multiple of 10"),
    (
      ("report", "--config.sources.squares.kind=openmojy"),
      "did you mean 'openmoji'",
    ),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, flags, message):
  assert run(folder, *flags) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and said.count("\n") == 1
  assert message in said


def test_an_unknown_config_names_the_nearest(folder, capsys):
  assert main(["tokenizers", "report", f"--config={folder}/confg.py"]) == 2
  assert "config.py'" in capsys.readouterr().err


def test_pictures_are_squared_as_preparation_does(tmp_path):
  """Any size is taken, and the same function cuts and resizes as in `data`."""
  pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 70, 3), np.uint8)
  for folder, image in zip(("a", "b/c"), pixels, strict=True):
    (tmp_path / folder).mkdir(parents=True)
    # One name in both: what follows the "/" is no style, and no picture is lost.
    Image.fromarray(image).save(tmp_path / folder / "cat.png")
    (tmp_path / folder / "cat.txt").write_text("a cat")
  source = {"kind": "image_folder", "path": str(tmp_path), "heldout": 0.0}
  found = gather_pictures(recipe_of({"mine": source}), 16)
  assert list(found) == ["mine/train"]
  assert (found["mine/train"] == [square(image, 16) for image in pixels]).all()


def test_a_source_that_gives_no_picture_is_named(folder, capsys):
  changed = textwrap.dedent(SOURCE).replace("np.uint8", "np.float32")
  (folder / "floats.py").write_text(changed)
  kind = "--config.sources.squares.kind=floats:Squares"
  assert run(folder, "train-image", f"--output={folder}/out", kind) == 2
  said = capsys.readouterr().err
  assert "source 'squares': picture '0/line' is float32[16, 16, 3]" in said
  assert not list((folder / "out").iterdir())


def test_text_alone_has_a_report_without_pictures(tmp_path, capsys):
  (tmp_path / "texts.jsonl").write_text('{"text": "words and words"}\n')
  (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
  kind = "--config.sources.squares.kind=jsonl"
  path = f"--config.sources.squares.path={tmp_path}/texts.jsonl"
  assert run(tmp_path, "report", kind, path) == 0
  said = capsys.readouterr().out
  assert "bytes_per_token" in said and "perplexity" not in said


@pytest.mark.parametrize("kinds", ["openmoji flags", "flags factbook"])
def test_the_licence_of_openmoji_comes_with_its_pictures(kinds):
  packaged = ImageTokenizer.load().notes["licence"]
  sources = {kind: {"kind": kind} for kind in kinds.split()}
  assert licence(recipe_of(sources)) == packaged
  assert licence(recipe_of(sources, licence="mine.")) == f"mine. {packaged}"


def test_own_pictures_are_under_their_own_terms():
  """A copy of the shipped config, its sources replaced, says nothing of them."""
  mapping = vq_openmoji.get_config().to_dict()
  assert "OpenMoji" in licence(from_mapping(Recipe, mapping))
  mapping["sources"] = {"mine": {"kind": "image_folder", "path": "pictures"}}
  assert licence(from_mapping(Recipe, mapping)) == ""
  mapping["licence"] = "CC0"
  assert licence(from_mapping(Recipe, mapping)) == "CC0"


def test_debug_shows_the_traceback(folder):
  with pytest.raises(UserError, match="there is no file"):
    run(folder, "report", "--debug", "--image=none.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "text.json"
  storage.write(path, b"old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(UserError, match="No space left"):
    storage.write(path, b"new")
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["text.json"]


def test_an_output_that_cannot_be_written_fails_before_the_work(folder, capsys):
  (folder / "file").write_text("in the way")
  assert run(folder, "train-image", f"--output={folder}/file") == 2
  assert "cannot write into" in capsys.readouterr().err
