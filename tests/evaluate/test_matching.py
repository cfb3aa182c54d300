"""Retrieval by likelihood: hits that are known, groups, chance."""

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.evaluate.matching import diagonal_wins, match
from tests.evaluate.pictures import VOCABULARY, FakeScorer, captioned
from tests.models import tiny

KINDS = ("caption_to_image", "image_to_caption")


def number_of(ids):
  """Which example a caption or a picture is of, None where there is neither."""
  codes = [i - 40 for i in ids if i >= 40]
  words = [i - 10 for i in ids if 10 <= i < 40]
  if codes:
    return 10 * codes[0] + codes[1]
  return words[0] if words else None


def knowing(given, wanted):
  """Right pairs are 2 nats likelier; each thing has a likelihood of its own."""
  own = -5.0 * number_of(wanted)
  return own + 2.0 * (number_of(given) == number_of(wanted))


@pytest.mark.smoke
def test_mutual_information_forgives_an_unlikely_picture():
  """By likelihood alone the likeliest candidate wins every query."""
  found = match(FakeScorer(knowing), captioned(4))
  assert found.chance == 1 / 4
  for kind in KINDS:
    assert found.hits[kind].tolist() == [True] * 4
    assert found.answers[kind].tolist() == [0, 1, 2, 3]
    assert found.hits[f"{kind}/likelihood"].tolist() == [True] + [False] * 3
    assert found.answers[f"{kind}/likelihood"].tolist() == [0] * 4


def test_each_example_is_a_query_once():
  """A last group that is short takes candidates from before, not queries."""
  scorer = FakeScorer(knowing)
  found = match(scorer, captioned(7), group=3)
  assert found.chance == 1 / 3
  for kind in KINDS:
    assert found.hits[kind].tolist() == [True] * 7
    assert found.answers[kind].tolist() == list(range(7))
    likeliest = [0, 0, 0, 3, 3, 3, 4]
    assert found.answers[f"{kind}/likelihood"].tolist() == likeliest
  assert scorer.documents == 2 * 7 + 3 * 2 * 9


def test_a_tie_is_no_hit():
  """A model that does not look at the condition has guessed nothing."""
  found = match(FakeScorer(lambda given, wanted: -1.0), captioned(3))
  assert not any(hits.any() for hits in found.hits.values())
  matrix = np.array([[1.0, 1.0], [0.0, 2.0]])
  assert diagonal_wins(matrix).tolist() == [False, True]


def test_one_picture_cannot_be_matched():
  with pytest.raises(UserError, match="at least 2 examples"):
    match(FakeScorer(knowing), captioned(1))


def test_real_model():
  """The documents are valid ones of a model with towers."""
  model, params = tiny.make(2, vocab_size=80)
  model = model.clone(vocabulary=VOCABULARY)
  found = match(Scorer(model, params), captioned(3))
  assert set(found.hits) == {*KINDS, *(f"{k}/likelihood" for k in KINDS)}
