"""Byte-pair text: no byte is lost, no special id can be spelt."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionlab.errors import UserError
from fusionlab.tokenizers import TextTokenizer, storage
from fusionlab.tokenizers.text import SPECIALS

TEXTS = [
  "the red apple and the green apple",
  "der rote Apfel",
  "赤いリンゴ",
] * 9
PACKAGED = TextTokenizer.load()


@pytest.fixture(scope="module")
def small():
  return TextTokenizer.train(TEXTS, 280)


@pytest.mark.smoke
@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_unicode_text_comes_back_with_all_its_bytes(text):
  ids = PACKAGED.encode(text)
  assert PACKAGED.decode(ids) == text
  assert PACKAGED.byte_lengths()[ids].sum() == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, " ", "<", "pad>", "\n", "a"])))
def test_spelt_specials_are_text(pieces):
  text = "".join(pieces)
  ids = PACKAGED.encode(text)
  assert not set(ids) & set(range(len(SPECIALS)))
  assert PACKAGED.decode(ids) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_a_batch_gives_what_single_texts_give(texts):
  assert PACKAGED.encode_batch(texts) == [PACKAGED.encode(t) for t in texts]


@pytest.mark.smoke
def test_the_packaged_file_has_the_promised_ids():
  lengths = PACKAGED.byte_lengths()
  assert PACKAGED.vocab_size == 3584
  assert lengths.dtype == np.int32 and lengths.shape == (3584,)
  assert (lengths[:5] == 0).all() and (lengths[5:] > 0).all()
  assert (lengths == 1).sum() == 256


def test_decode_skips_specials_and_replaces_broken_bytes(small):
  assert PACKAGED.decode([1, *PACKAGED.encode("apple"), 2, 0]) == "apple"
  assert PACKAGED.decode(np.array(PACKAGED.encode("apple"))) == "apple"
  # The first byte of a two-byte character alone.
  first, second = small.encode("é")
  assert small.decode([first]) == "\ufffd"
  assert small.decode([first, second]) == "é"


def test_training_is_repeatable_and_saving_keeps_the_hash(small, tmp_path):
  again = TextTokenizer.train(iter(TEXTS), 280)
  again.save(tmp_path / "folder" / "text.json")
  loaded = TextTokenizer.load(str(tmp_path / "folder" / "text.json"))
  assert small.hash == again.hash == loaded.hash
  assert small.hash != PACKAGED.hash
  assert loaded.encode("apple") == small.encode("apple")
  assert [p.name for p in (tmp_path / "folder").iterdir()] == ["text.json"]


def test_merges_are_learned(small):
  assert len(small.encode("the apple")) < len("the apple")


@pytest.mark.parametrize(
  ("vocab_size", "message"),
  [(260, "at least 261"), (4000, "give only")],
)
def test_an_impossible_vocabulary_is_refused(vocab_size, message):
  with pytest.raises(UserError, match=message):
    TextTokenizer.train(TEXTS, vocab_size)


@pytest.mark.parametrize(
  "ids", [[-1], [3584], np.array([5000])], ids=["negative", "size", "array"]
)
def test_an_id_outside_the_text_range_is_refused(ids):
  with pytest.raises(UserError, match="is not a text id"):
    PACKAGED.decode(ids)


def test_lone_surrogates_are_refused():
  with pytest.raises(UserError, match="lone surrogate at character 1"):
    PACKAGED.encode("a\ud800")


def changed(change):
  content = json.loads(storage.packaged(storage.TEXT_FILE).read_bytes())
  change(content)
  return json.dumps(content).encode()


def swap_specials(content):
  vocab = content["model"]["vocab"]
  vocab["<pad>"], vocab["<bos>"] = vocab["<bos>"], vocab["<pad>"]


def add_token(content):
  token = {"id": 0, "content": "<pad>", "special": True}
  flags = dict.fromkeys(
    ["single_word", "lstrip", "rstrip", "normalized"], False
  )
  content["added_tokens"] = [token | flags]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (swap_specials, "ids 0..4 are not"),
    (add_token, "added tokens"),
    (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "byte-level"),
    (lambda c: c.update(pre_tokenizer=None), "byte-level"),
    (lambda c: c.update(normalizer={"type": "NFC"}), "changes text"),
    (lambda c: c["model"].update(dropout=0.5), "at random"),
  ],
)
def test_a_file_that_breaks_the_promises_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    TextTokenizer(changed(change))


def test_the_unchanged_content_is_accepted():
  assert TextTokenizer(changed(lambda content: None)).vocab_size == 3584


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"{}",
    b"\xff\xfe",
    storage.packaged(storage.TEXT_FILE).read_bytes()[:-100],
    storage.packaged(storage.IMAGE_FILE).read_bytes()[:2000],
  ],
  ids=["empty", "object", "binary", "truncated", "other"],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(content, tmp_path):
  path = tmp_path / "bad.json"
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"bad\.json.*is not a whole") as caught:
    TextTokenizer.load(str(path))
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(UserError, match="there is no file"):
    TextTokenizer.load(str(tmp_path / "none.json"))
