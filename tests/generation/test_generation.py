"""`generate` as a caller sees it: texts and pictures in, texts and pictures out."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import fusionlab
from fusionlab.errors import UserError
from fusionlab.generation import command, prompts
from fusionlab.generation.config import Request
from fusionlab.generation.generate import generate
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.tokenizers import load_tokenizers


@pytest.fixture(scope="module")
def trio():
  """A model with drawn parameters on the packaged tokenizers."""
  tokenizers = load_tokenizers()
  config = MixtureOfTransformersConfig(
    dim=32, num_layers=1, num_heads=2, ffn_dim=32, compute_dtype="float32"
  )
  model = build_model(config, tokenizers.vocabulary, 192)
  return model, model.init_params(jax.random.key(0)), tokenizers


@pytest.fixture(scope="module")
def picture():
  rng = np.random.default_rng(0)
  return rng.integers(0, 255, (80, 64, 3), np.uint8)


def test_a_prompt_is_the_beginning_of_a_document(trio, picture, tmp_path):
  """<bos>, then parts in order; a picture is 64 codes between its brackets."""
  tokenizers = trio[2]
  path = tmp_path / "a.png"
  Image.fromarray(picture).save(path)
  v = tokenizers.vocabulary
  words = tokenizers.text.encode("red apple")
  ids = prompts.encode(["red apple", path, " and"], tokenizers).ids
  assert ids[: 2 + len(words)] == [v.bos, *words, v.begin[1]]
  assert ids[2 + len(words) + 64] == v.end[1]
  assert prompts.encode("red apple", tokenizers).ids == [v.bos, *words]
  same = [path, picture, Image.fromarray(picture)]
  codes = [prompts.encode([p], tokenizers).ids for p in same]
  assert codes[0] == codes[1] == codes[2]


def test_ids_show_their_parts_in_order(trio, picture):
  tokenizers = trio[2]
  ids = prompts.encode(["red apple", picture, "clock"], tokenizers).ids
  words, shown, more = prompts.decode([ids], tokenizers)[0]
  assert (words, more) == ("red apple", "clock")
  assert shown.shape == (64, 64, 3) and shown.dtype == np.uint8
  at = ids.index(tokenizers.vocabulary.begin[1])
  with pytest.raises(UserError, match="end after 3 of a picture's 64 codes"):
    prompts.decode([ids[: at + 4]], tokenizers)


def test_one_picture_for_each_sample_of_each_prompt(trio):
  results = generate(*trio, ["red apple", "clock"], make="image", num_samples=2)
  assert [(r.prompt, r.sample) for r in results] == [
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 1),
  ]
  for r in results:
    assert [p.shape for p in r.pictures] == [(64, 64, 3)]
    assert r.text == "" and r.finish == "stop"
  assert results[0].ids != results[1].ids


def test_a_sample_is_its_prompts_and_seeds_alone(trio):
  options = {"max_new_tokens": 12, "temperature": 1.0}
  many = generate(*trio, ["a", "red apple", "b"], rows=2, **options)
  one = generate(*trio, "red apple", **options)
  other = generate(*trio, "red apple", seed=1, **options)
  assert one[0].ids == many[1].ids != other[0].ids


def test_text_that_was_asked_for_is_not_empty(trio):
  """Though <eos> is by far the likeliest, it is not the first id."""
  v = trio[2].vocabulary

  def end(logits, state):
    return logits.at[:, v.eos].add(1e3)

  text = generate(*trio, "a", make="text", processors=[end])[0]
  auto = generate(*trio, "a", processors=[end])[0]
  assert len(text.ids) == len(auto.ids) + 1
  assert text.finish == auto.finish == "eos" and auto.parts == ()


def test_text_has_no_picture_and_auto_may(trio):
  text = generate(*trio, "a", make="text", num_samples=4, temperature=1.0)
  assert all(not r.pictures for r in text)
  assert {r.finish for r in text} <= {"eos", "length"}
  v = trio[2].vocabulary

  def open_picture(logits, state):
    first = state.length == 2
    return logits.at[:, v.begin[1]].add(1e3 * first)

  both = generate(
    *trio, [[v.bos, 100]], processors=[open_picture], temperature=1.0, top_k=0
  )[0]
  assert len(both.pictures) >= 1
  assert not isinstance(both.parts[0], str)


def test_stop_strings_end_a_text_and_are_cut_off(trio):
  tokenizers = trio[2]
  word = tokenizers.text.encode(" stop")
  start = len(tokenizers.text.encode("a")) + 1

  def say(logits, state):
    wanted = [7 + 300, 7 + 301, *word]
    for i, token in enumerate(wanted):
      here = (state.length == start + i)[:, None]
      logits = logits.at[:, token].add(1e4 * here[:, 0])
    return logits

  whole = generate(
    *trio, "a", make="text", processors=[say], max_new_tokens=8, top_k=1
  )[0]
  at = whole.text.index(" stop")
  cut = generate(
    *trio,
    "a",
    make="text",
    processors=[say],
    max_new_tokens=8,
    top_k=1,
    stop=["zzz", "top"],
  )[0]
  assert cut.text == whole.text[:at] + " s"
  assert cut.finish == "stop"
  assert whole.ids[: len(cut.ids)] == cut.ids


def test_a_picture_is_a_prompt_of_its_own(trio, picture, tmp_path):
  Image.fromarray(picture).save(tmp_path / "a.png")
  options = {"make": "text", "max_new_tokens": 3}
  one = generate(*trio, picture, **options)
  three = generate(*trio, [tmp_path / "a.png", picture, [picture]], **options)
  assert [r.ids for r in three] == [one[0].ids] * 3


def test_progress_reaches_the_end(trio):
  seen = []
  generate(
    *trio,
    ["a", "b", "c"],
    rows=2,
    max_new_tokens=4,
    on_progress=lambda done, count: seen.append((done, count)),
  )
  assert seen[-1] == (3, 3)


@pytest.mark.parametrize(
  ("arguments", "options", "said"),
  [
    ([], {}, "no prompt was given"),
    ("a", {"make": "imge"}, "unknown make='imge', did you mean 'image'"),
    ("a", {"temperatur": 1.0}, "temperatur.*did you mean.*temperature"),
    ("a", {"top_p": 1.5}, "sampling.top_p"),
    ("a", {"num_samples": 0}, "num_samples=0 must be at least 1"),
    ("a", {"diffusion_steps": 0}, "sampling.diffusion_steps"),
    ("a", {"snapshots": 3}, "snapshots=3: for continuous pictures"),
    ("word " * 200, {}, "has 2.. tokens; the model was trained on rows of 192"),
  ],
)
def test_mistakes_are_one_line(trio, arguments, options, said):
  with pytest.raises(UserError, match=said) as error:
    generate(*trio, arguments, **options)
  assert "\n" not in str(error.value)


def test_files_that_are_no_pictures_are_named(trio, tmp_path):
  file = tmp_path / "notes.png"
  file.write_text("not a picture")
  for path, said in (
    (file, "notes.png is not a picture"),
    (tmp_path / "no.png", "cannot read"),
  ):
    with pytest.raises(UserError, match=said):
      generate(*trio, [[path]])


@pytest.fixture
def workdir(trio, monkeypatch, tmp_path):
  """A folder whose checkpoint is the tiny model."""
  monkeypatch.setattr(command, "load_model", lambda path: trio)
  monkeypatch.setattr(command, "find", lambda path: path / "checkpoints" / "7")
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  return tmp_path / "run"


def test_the_command_writes_pictures_and_texts(
  workdir, picture, tmp_path, capsys
):
  Image.fromarray(picture).save(tmp_path / "a.png")
  request = Request(
    ("red apple", "clock"),
    (str(tmp_path / "a.png"),),
    settings={"make": "image", "num_samples": 2, "temperature": 0.5},
  )
  folder = command.run(str(workdir), request)
  assert folder == workdir / "generated" / "001"
  said = json.loads((folder / "generated.json").read_text())
  files = [r["parts"][0]["picture"] for r in said["results"]]
  assert files == ["000_0.png", "000_1.png", "001_0.png", "001_1.png"]
  assert said["results"][2]["prompt"] == [f"<{tmp_path / 'a.png'}>", "clock"]
  for file in files:
    assert Image.open(folder / file).size == (64, 64)
  printed = capsys.readouterr().out
  assert "clock → <001_1.png>" in printed
  assert re.search(r"written: \S+generated/001", printed)
  again = command.run(str(workdir), Request(("a",), settings={"make": "text"}))
  assert again.name == "002"
  assert (again / "generated.txt").read_text().startswith("000_0  a → ")


def test_nothing_half_written_is_left(workdir, monkeypatch):
  def broken(*arguments):
    raise OSError("disk full")

  monkeypatch.setattr(command, "_write", broken)
  with pytest.raises(OSError, match="disk full"):
    command.run(str(workdir), Request(("a",), settings={"make": "text"}))
  assert list((workdir / "generated").iterdir()) == []


@pytest.mark.parametrize(
  ("texts", "images", "said"),
  [
    ((), (), "needs --prompt, --image or --prompt_file"),
    (("a", "b"), ("c", "d", "e"), "2 prompts and 3 images"),
  ],
)
def test_prompts_and_images_are_paired_or_refused(texts, images, said):
  with pytest.raises(UserError, match=said):
    command.pair(texts, images)


def test_an_existing_folder_is_not_overwritten(workdir):
  with pytest.raises(UserError, match="exists; name a folder that does not"):
    command.run(str(workdir), Request(("a",), out=str(workdir)))


def test_it_is_in_the_public_interface(trio):
  assert fusionlab.generate(*trio, "a", max_new_tokens=2)[0].prompt == 0
