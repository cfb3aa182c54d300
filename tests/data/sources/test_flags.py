"""Kind `flags`: one picture and several facts per place."""

import numpy as np
import pytest

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import load_source
from fusionlab.data.sources.flags import first, names_in


def test_counts(flags):
  held = [e for e in flags.values() if e.split == "heldout_place"]
  assert abs(len(flags) - 236) <= 3
  assert abs(len(held) - 22) <= 1
  assert {e.split for e in flags.values()} == {"train", "heldout_place"}


def test_captions_say_facts_then_names(flags):
  captions = flags["fr"].parts[0].alternatives
  assert captions[0] == "flag: France. capital: Paris. location: Western Europe"
  assert captions[1].startswith("flag: France. languages: French. population:")
  assert captions[2].startswith("flag: France. neighbours: ")
  assert captions[3] == "flag: France"
  assert "Flagge: frankreich" in captions and "旗帜: 法国" in captions
  for example in flags.values():
    captions = example.parts[0].alternatives
    assert captions[0].startswith("flag: ") and len(captions) >= 12
    assert len(set(captions)) == len(captions)
    assert max(map(len, captions)) < 160


def test_flags_are_distinct_coloured_pictures(flags):
  pictures = [e.parts[1].alternatives[0] for e in flags.values()]
  assert {p.shape for p in pictures} == {(64, 64, 3)}
  assert len({p.tobytes() for p in pictures}) == len(pictures)
  assert all(np.ptp(p.astype(int), axis=-1).max() > 32 for p in pictures)


def test_equal_flags_belong_to_the_place_more_is_known_about(flags):
  assert "no" in flags  # Norway, not Svalbard or Bouvet Island.
  assert "sv" not in flags and "bv" not in flags


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("text", "short"),
  [
    ("Southern Europe, a peninsula", "Southern Europe"),
    ("Washington, D.C.", "Washington, D.C."),
    ("Rangoon (Yangon); note", "Rangoon"),
    ("metropolitan France: Western Europe, by", "Western Europe"),
    ("", ""),
  ],
)
def test_first(text, short):
  assert first(text) == short


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("text", "names"),
  [
    (
      "Austria 404 km; France 476 km; Spain 1 km; Italy 2 km",
      "Austria, France, Spain",
    ),
    ("English (official), French 22%, other 3%", "English, French"),
    ("unspecified 100%", ""),
  ],
)
def test_names_in(text, names):
  assert names_in(text) == names


def test_the_same_twice(flags):
  source = load_source("again", SourceConfig(kind="flags"))
  again = list(source.examples())
  assert len(source) == len(again)
  assert [(e.key, e.split, e.parts[0]) for e in again] == [
    (e.key, e.split, e.parts[0]) for e in flags.values()
  ]
  assert (
    source.fingerprint()
    == load_source("x", SourceConfig(kind="flags")).fingerprint()
  )
