"""`python -m fusionlab.tokenizers`: it makes files, or says one line."""

import json
import os
import textwrap

import pytest

from fusionlab.errors import UserError
from fusionlab.tokenizers import ImageTokenizer, TextTokenizer, storage
from fusionlab.tokenizers.__main__ import main

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
  capsys.readouterr()
  run(folder, "train-text", f"--output={out}")
  files = (f"--text={out}/text.json", f"--image={out}/image.safetensors")
  assert run(folder, "report", *files) == 0
  assert "perplexity" in capsys.readouterr().out


def test_held_out_pictures_do_not_change_the_file(folder):
  assert run(folder, "train-image", f"--output={folder}/one") == 0
  source = folder / "squares.py"
  changed = source.read_text().replace("20 * i", "20 * i if i >= 4 else 7")
  assert changed != source.read_text()
  (folder / "others.py").write_text(changed)
  kind = "--config.sources.squares.kind=others:Squares"
  assert run(folder, "train-image", f"--output={folder}/two", kind) == 0
  one, two = (
    (folder / name / "image.safetensors").read_bytes()
    for name in ("one", "two")
  )
  assert one == two


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "give one verb"),
    (("train-txt",), "did you mean 'train-text'"),
    (("train-text",), "needs --output=FOLDER"),
    (("train-text", "--outptu=x"), "Did you mean: output"),
    (("report", "--image=none.safetensors"), "there is no file"),
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


def test_pictures_of_another_size_are_refused_by_name(folder, capsys):
  flags = ("train-image", f"--output={folder}/out")
  assert run(folder, *flags, "--config.sources.squares.path=32") == 2
  said = capsys.readouterr().err
  assert "source 'squares': picture '0/line' is uint8[32, 32, 3]" in said
  assert not list((folder / "out").iterdir())


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
