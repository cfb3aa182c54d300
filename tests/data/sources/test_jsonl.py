"""Kind `jsonl`: texts and captioned pictures, and what is refused."""

import json

import pytest
from PIL import Image

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import load_source
from fusionlab.errors import UserError


def source(folder, *lines, **options):
  Image.new("RGB", (6, 5), "red").save(folder / "a.png")
  rows = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
  (folder / "l.jsonl").write_bytes(b"\n".join(rows) + b"\n")
  options = {"kind": "jsonl", "path": str(folder / "l.jsonl"), **options}
  return load_source("mine", SourceConfig(**options))


@pytest.mark.smoke
def test_texts_and_pictures_with_line_numbers_as_keys(tmp_path):
  made = source(
    tmp_path,
    {"text": "alone\u2028and one line"},
    b"",
    {"image": "a.png", "caption": ["a red one", "rot"], "id": 3},
    {"image": "a.png", "text": "plain"},
    heldout=0.0,
  )
  examples = list(made.examples())
  assert [e.key for e in examples] == ["1", "3", "4"] and len(made) == 3
  assert [len(e.parts) for e in examples] == [1, 2, 2]
  assert examples[0].parts[0].alternatives == ("alone\u2028and one line",)
  assert examples[1].parts[0].alternatives == ("a red one", "rot")
  image = examples[2].parts[1].alternatives[0]
  assert image.shape == (5, 6, 3) and image[0, 0].tolist() == [255, 0, 0]


@pytest.mark.smoke
def test_fields_by_name(tmp_path):
  row = {"picture": "a.png", "words": "w", "text": "not this"}
  made = source(tmp_path, row, image_field="picture", text_field="words")
  (example,) = made.examples()
  assert example.parts[0].alternatives == ("w",) and len(example.parts) == 2


def test_the_same_picture_is_on_one_side(tmp_path):
  rows = [{"image": "a.png", "caption": f"c{n}"} for n in range(40)]
  splits = {e.split for e in source(tmp_path, *rows, heldout=0.5).examples()}
  assert len(splits) == 1
  rows = [{"text": f"c{n}"} for n in range(40)]
  splits = {e.split for e in source(tmp_path, *rows, heldout=0.5).examples()}
  assert splits == {"train", "heldout"}


def test_fingerprint_follows_the_file_and_its_pictures(tmp_path):
  one = source(tmp_path, {"image": "a.png", "text": "t"}).fingerprint()
  Image.new("RGB", (60, 50), "blue").save(tmp_path / "a.png")
  config = SourceConfig(kind="jsonl", path=str(tmp_path / "l.jsonl"))
  two = load_source("mine", config).fingerprint()
  assert one != two == load_source("mine", config).fingerprint()


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      b'{"text": ',
      r"line 2 is not JSON \(Expecting value, column \d+\); write",
    ),
    (b"[" * 100_000, r"line 2 is not JSON \(nested too deeply\)"),
    (b'["a"]', "line 2 is a JSON list, not an object"),
    (b'{"text": "caf\xe9"}', r"line 2 is not UTF-8 \(byte 0xe9"),
    (b'{"text": "\\ud800"}', "line 2: 'text' has half a surrogate"),
    ({"captoin": "x"}, "line 2 has no field 'caption' or 'text'"),
    ({"text": 3}, "line 2: 'text' must be text or a list of texts"),
    ({"text": " "}, "line 2: 'text' must be text .* none empty"),
    ({"text": []}, "line 2: 'text' must be text"),
    ({"image": "b.png", "text": "t"}, r"line 2: there is no picture .*b\.png"),
    ({"image": 3, "text": "t"}, "line 2: 'image' must be the path"),
    ({"image": "l.jsonl", "text": "t"}, r"line 2: .*l\.jsonl is not a picture"),
    ({"image": "a.png"}, "line 2 has no field 'caption' or 'text'"),
  ],
)
def test_bad_lines_are_named(tmp_path, line, message):
  with pytest.raises(UserError, match=message) as error:
    list(source(tmp_path, {"text": "good"}, line).examples())
  assert "'mine'" in str(error.value) and "\n" not in str(error.value)
  assert "l.jsonl" in str(error.value)


@pytest.mark.smoke
def test_an_empty_file_a_folder_and_none(tmp_path):
  with pytest.raises(UserError, match=r"l\.jsonl is empty; write one JSON"):
    len(source(tmp_path))
  with pytest.raises(UserError, match="is a folder; kind 'jsonl' needs a file"):
    load_source("mine", SourceConfig(kind="jsonl", path=str(tmp_path)))
  with pytest.raises(UserError, match="does not exist"):
    load_source("mine", SourceConfig(kind="jsonl", path=str(tmp_path / "x")))
