"""Kind `factbook`: passages, each once, places on one side."""

import re
from collections import defaultdict

import pytest

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import load_source
from fusionlab.data.sources.factbook import SHORTEST, Factbook, letters
from fusionlab.data.sources.places import Place, plain


def text_of(example) -> str:
  assert len(example.parts) == 1 and example.parts[0].modality == "text"
  (text,) = example.parts[0].alternatives
  return text


def test_counts(factbook):
  held = [e for e in factbook.values() if e.split == "heldout_place"]
  assert abs(len(factbook) - 4470) <= 10
  assert abs(len(held) - 405) <= 5
  assert abs(sum(len(text_of(e)) for e in factbook.values()) - 2.415e6) < 1e4


def test_a_place_is_on_one_side_here_and_among_the_flags(factbook, flags):
  sides = defaultdict(set)
  for key, example in (*factbook.items(), *flags.items()):
    sides[key.split("/")[0]].add(example.split)
  assert all(len(s) == 1 for s in sides.values())
  assert sum(s == {"heldout_place"} for s in sides.values()) == 24


def test_each_passage_once(factbook):
  bodies = [letters(text_of(e).split(": ", 1)[1]) for e in factbook.values()]
  assert len(set(bodies)) == len(bodies)


def test_a_text_of_both_sides_is_in_neither(monkeypatch):
  source = Factbook(SourceConfig(kind="factbook"), "f")
  shared, own = "the same words " * 20, "words of its own " * 20

  def place(code, *texts):
    fields = {f"field {n}": {"text": t} for n, t in enumerate(texts)}
    return Place(code, code.upper(), {"Section": fields}, "")

  splits = {code: place(code).split for code in ("it", "fr")}
  assert splits == {"it": "heldout_place", "fr": "train"}
  source._places = (
    place("fr", f"<p>{shared}</p>"),
    place("it", shared.upper() + "!", own),
  )
  assert [e.key for e in source.examples()] == ["it/Section/field 1/text"]


def test_texts_are_plain_and_say_what_they_are_about(factbook):
  text = text_of(factbook["fr/Introduction/Background/text"])
  assert text.startswith("France - Background: France today is one of")
  for example in factbook.values():
    text = text_of(example)
    assert re.match(r"[^:]+ - [^:]+: ", text) and len(text) > SHORTEST
    assert not re.search(r"</?[a-z]+>|&[a-z]+;|\s\s", text)


@pytest.mark.smoke
def test_plain_resolves_html():
  html = (
    "<p>C&ocirc;te <strong>d'Ivoire</strong></p><br>x &lt; 1 &amp;amp; <0.1%"
  )
  assert plain(html) == "Côte d'Ivoire x < 1 & <0.1%"


def test_the_same_twice(factbook):
  config = SourceConfig(kind="factbook")
  source = load_source("again", config)
  assert list(source.examples()) == list(factbook.values())
  assert len(source) == len(factbook)
  assert source.fingerprint() == load_source("x", config).fingerprint()
