"""Tokenizers of other models: ids in place, no special can be spelt."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fusionlab.errors import UserError
from fusionlab.tokenizers import (
  ImageTokenizer,
  TextTokenizer,
  Tokenizers,
  load_tokenizers,
  make_tokenizers,
)
from fusionlab.tokenizers.hugging_face import Specials
from tests.tokenizers import foreign

FILES = {
  "bytes": foreign.byte_level(),
  "bpe": foreign.sentencepiece(),
  "unigram": foreign.sentencepiece("Unigram"),
}
MADE = {
  "bytes": TextTokenizer.from_hugging_face(
    FILES["bytes"], size=300, bos=None, eos=0
  ),
  "bpe": TextTokenizer.from_hugging_face(
    FILES["bpe"], size=280, bos=1, eos=2, pad=0
  ),
  "unigram": TextTokenizer.from_hugging_face(
    FILES["unigram"], size=280, bos=1, eos=2
  ),
}
# "▁" is a space to sentencepiece.
PLAIN = st.text(
  st.characters(codec="utf-8", exclude_characters="▁"), min_size=1
)
SPELT = [foreign.END, "<|user|>", *foreign.CONTROL, "<", "s>", " ", "é", "the"]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("text", ["the red apple", " <s> x", "赤い  é\n", ""])
def test_ids_are_those_of_the_library(kind, text):
  made = MADE[kind]
  library = Tokenizer.from_str(FILES[kind].decode())
  library.no_padding()
  library.no_truncation()
  library.encode_special_tokens = True
  if kind != "unigram":  # which finds "<s>" in a text all the same
    expected = library.encode(text, add_special_tokens=False).ids
    assert made.encode(text) == expected
  assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.sampled_from(SPELT)))
def test_spelt_specials_are_text(kind, pieces):
  made, text = MADE[kind], "".join(pieces)
  ids = made.encode(text)
  silent = set(np.flatnonzero(made.byte_lengths() == 0).tolist())
  assert not set(ids) & silent and made.specials.ids <= silent
  assert made.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_byte_level_bytes_are_all_there(text):
  ids = MADE["bytes"].encode(text)
  assert MADE["bytes"].decode(ids) == text
  assert MADE["bytes"].byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=100, deadline=None)
@given(text=PLAIN)
def test_sentencepiece_counts_its_own_first_space(kind, text):
  made = MADE[kind]
  ids = made.encode(text)
  assert made.decode(ids) == text
  assert made.byte_lengths()[ids].sum() == len(text.encode()) + 1


@pytest.mark.parametrize("kind", MADE)
def test_what_continues_a_text_keeps_its_space(kind):
  made = MADE[kind]
  ids = made.encode("the apple")
  for cut in range(1, len(ids)):
    rest = made.decode(ids[cut:], continues=True)
    assert made.decode(ids[:cut]) + rest == "the apple"


def test_tokens_that_were_added_and_are_not_special_are_text():
  made = MADE["bytes"]
  assert 281 in made.encode("a<tool>b")
  assert made.byte_lengths()[281] == 6
  assert made.decode([281, 280, 0, 299]) == "<tool>"


@pytest.mark.parametrize(
  ("given_ids", "expected"),
  [
    ({"bos": None, "eos": 2}, (2, 2, 2)),
    ({"bos": 1, "eos": None}, (1, 1, 1)),
    ({"bos": 1, "eos": 2}, (2, 1, 2)),
    ({"bos": 1, "eos": 2, "pad": 0}, (0, 1, 2)),
  ],
)
def test_a_missing_special_is_shared(given_ids, expected):
  made = TextTokenizer.from_hugging_face(FILES["bpe"], size=280, **given_ids)
  assert made.specials == Specials(*expected, None, None)
  assert made.vocab_size == made.base_size == 280


def test_todays_file_has_the_ids_it_had():
  made = TextTokenizer.load()
  assert made.specials == Specials(0, 1, 2, 3, 4)
  assert made.base_size == made.vocab_size == 3584
  assert made.with_picture_borders() is made


@pytest.mark.parametrize("kind", MADE)
def test_one_file_holds_it_all(kind, tmp_path):
  made = MADE[kind].with_picture_borders()
  made.save(tmp_path / "text.json")
  loaded = TextTokenizer.load(str(tmp_path / "text.json"))
  assert loaded.hash == made.hash != MADE[kind].hash
  assert loaded.specials == made.specials
  assert loaded.vocab_size == made.base_size + 2
  assert loaded.encode("the apple") == MADE[kind].encode("the apple")
  assert json.loads(loaded.tokenizer_json()) == json.loads(FILES[kind])


def folder_of(path, kind="bytes", **files):
  (path / "tokenizer.json").write_bytes(FILES[kind])
  for name, content in files.items():
    (path / f"{name}.json").write_text(json.dumps(content))
  return str(path)


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({}, (0, 0, 0)),
    ({"config": {"eos_token_id": [280, 0], "vocab_size": 320}}, (280,) * 3),
    (
      {
        "config": {"bos_token_id": None, "pad_token_id": -1},
        "generation_config": {"bos_token_id": 5, "pad_token_id": 6},
        "tokenizer_config": {"eos_token": {"content": "<|user|>"}},
      },
      (6, 5, 280),
    ),
  ],
)
def test_a_folder_says_what_the_specials_are(files, expected, tmp_path):
  made = TextTokenizer.load(folder_of(tmp_path, **files))
  special = made.specials
  assert (special.pad, special.bos, special.eos) == expected
  assert made.base_size == files.get("config", {}).get("vocab_size", 282)
  file = str(tmp_path / "tokenizer.json")
  assert TextTokenizer.load(file).hash == made.hash


def changed(kind="bytes", **fields):
  return json.dumps(json.loads(FILES[kind]) | fields).encode()


@pytest.mark.parametrize(
  ("content", "options", "message"),
  [
    (FILES["bytes"][:-9], {}, "is not a whole file of the tokenizers"),
    (b"[]", {}, "is not a whole file of the tokenizers"),
    (FILES["bytes"], {"size": 281}, r"ids up to 281, the model has 281"),
    (
      FILES["bytes"],
      {"bos": 0, "eos": 300},
      r"eos=300, which is not .*0\.\.299",
    ),
    (FILES["bytes"], {"pad": -1}, r"pad=-1, which is not"),
    (FILES["bytes"], {"eos": None}, "neither a bos nor an eos"),
    (changed(decoder=None), {}, "its decoder is none .allowed: ByteLevel"),
    (
      changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
      {},
      "its decoder is WordPiece",
    ),
    (
      changed(
        model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        added_tokens=[],
      ),
      {},
      "its model is WordLevel .allowed: BPE or Unigram",
    ),
  ],
)
def test_what_cannot_be_used_is_refused_in_one_line(content, options, message):
  options = {"size": 300, "bos": None, "eos": 0, "name": "'x.json'"} | options
  with pytest.raises(UserError, match=message) as caught:
    TextTokenizer.from_hugging_face(content, **options)
  assert "'x.json'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "other.2"}, "format 'other.2', this version reads"),
    ({"size": None}, "not a whole file of format"),
    ({"specials": {"colour": 0}}, "not a whole file of format"),
    ({"specials": {"boi": 7, "eoi": 8}}, "they follow its"),
  ],
)
def test_an_altered_file_of_ours_is_refused(change, message, tmp_path):
  MADE["bytes"].save(tmp_path / "text.json")
  content = json.loads((tmp_path / "text.json").read_text()) | change
  (tmp_path / "text.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=message) as caught:
    TextTokenizer.load(str(tmp_path / "text.json"))
  assert "\n" not in str(caught.value)


def test_a_broken_file_beside_it_is_named(tmp_path):
  folder = folder_of(tmp_path)
  (tmp_path / "config.json").write_text('{"eos_token_id": ')
  with pytest.raises(UserError, match=r"config\.json' is not JSON"):
    TextTokenizer.load(folder)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(UserError, match=r"config\.json' holds no JSON object"):
    TextTokenizer.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"no file .*tokenizer\.json"):
    TextTokenizer.load(str(tmp_path))


def test_pictures_get_borders_behind_the_text():
  image = ImageTokenizer.load()
  both = make_tokenizers(MADE["bytes"], image)
  vocabulary = both.vocabulary
  assert vocabulary.modalities == ("text", "image")
  assert vocabulary.sizes == (302, 512)
  assert vocabulary.begin == (0, 300) and vocabulary.end == (0, 301)
  assert vocabulary.specials == (0, 300, 301)
  assert both.block_lengths == (0, 64)
  assert both.text.decode([300, 301, 1]) == MADE["bytes"].decode([1])


def test_text_alone_is_a_vocabulary(tmp_path):
  alone = make_tokenizers(MADE["bytes"])
  assert alone.vocabulary.modalities == ("text",)
  assert alone.vocabulary.size == 300 and alone.block_lengths == (0,)
  assert alone.vocabulary.begin == alone.vocabulary.end == (0,)
  alone.save(tmp_path)
  again = Tokenizers.from_folder(tmp_path)
  assert again.image is None and again.hash == alone.hash
  assert again.vocabulary == alone.vocabulary
  with pytest.raises(UserError, match="a caption needs an image tokenizer"):
    again.pictures("a caption")


def test_the_packaged_text_alone():
  alone = load_tokenizers(image_path="none")
  assert alone.image is None and alone.vocabulary.size == 3584
  assert alone.hash != load_tokenizers().hash
