"""Captioned pictures of a split, their documents, and scores of each."""

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.evaluate.captioned import (
  caption_after_picture,
  caption_alone,
  captioned_examples,
  distinct,
  picture_after_caption,
)
from fusionlab.evaluate.examples import example_scores, mean_loss
from fusionlab.evaluate.unigram import unigram, unigram_nll
from fusionlab.tokenizers import TextTokenizer
from tests.evaluate.pictures import (
  VOCABULARY,
  FakePrepared,
  FakeScorer,
  captioned,
)

TEXT = (0, [[9]])
A = [(0, [[10], [11, 12]]), (1, [[40, 41]])]
B = [(0, [[13, 14]]), (1, [[42, 43]])]
SAME_CAPTION = [(0, [[13, 14]]), (1, [[44, 44]])]
SAME_PICTURE = [(0, [[15]]), (1, [[40, 41]])]
PREPARED = {
  "one": FakePrepared(train=[[TEXT], A, B], heldout=[[TEXT]]),
  "two": FakePrepared(train=[SAME_CAPTION, SAME_PICTURE, [TEXT, *A]]),
}


def keys(**options):
  found = captioned_examples(PREPARED, "train", VOCABULARY, **options)
  return [(e.source, e.key, e.index) for e in found]


def test_reads_the_captioned_pictures_of_all_sources():
  """In stored order, the first caption of each."""
  found = captioned_examples(PREPARED, "train", VOCABULARY)
  assert [(e.source, e.index) for e in found] == [
    ("one", 1),
    ("one", 2),
    ("two", 0),
    ("two", 1),
  ]
  assert found[0].caption.tolist() == [10]
  assert found[0].codes.tolist() == [40, 41]
  assert found[0].modality == 1
  assert captioned_examples(PREPARED, "heldout", VOCABULARY) == []


def test_draws_without_replacement_by_the_seed():
  assert keys(limit=3, seed=1) == keys(limit=3, seed=1)
  assert len(set(keys(limit=3))) == 3
  assert sorted(keys(limit=9)) == sorted(keys())
  drawn = {tuple(keys(limit=2, seed=s)) for s in range(20)}
  assert len(drawn) > 4


@pytest.mark.parametrize("seed", range(4))
def test_distinct_ones_share_neither_caption_nor_picture(seed):
  """Of four, two pairs share something."""
  examples = captioned_examples(
    PREPARED, "train", VOCABULARY, limit=4, seed=seed
  )
  assert len(examples) == 4
  found = distinct(examples, 4)
  assert len(found) == 2 and found[0] == examples[0]
  assert len(distinct(examples, 1)) == 1
  assert len({e.caption.tobytes() for e in found}) == 2
  assert len({e.codes.tobytes() for e in found}) == 2


def test_mistakes_are_named():
  with pytest.raises(UserError, match="no source has a split 'trian', did you"):
    captioned_examples(PREPARED, "trian", VOCABULARY)
  with pytest.raises(UserError, match="unknown modality 'video'"):
    captioned_examples(PREPARED, "train", VOCABULARY, modality="video")
  with pytest.raises(UserError, match="'text' is the text"):
    unigram(PREPARED, VOCABULARY, modality="text")


@pytest.mark.smoke
def test_documents():
  """As training writes them; spans hold codes, or a caption and its end."""
  a, b = captioned(2)
  found = picture_after_caption(a, b, VOCABULARY)
  assert found.ids == [1, 10, 3, 40, 41, 4]
  assert found.ids[slice(*found.span)] == [40, 41]
  found = picture_after_caption(None, b, VOCABULARY)
  assert found.ids == [1, 3, 40, 41, 4]
  assert found.ids[slice(*found.span)] == [40, 41]
  found = caption_after_picture(a, b, VOCABULARY)
  assert found.ids == [1, 3, 40, 41, 4, 10, 2]
  assert found.ids[slice(*found.span)] == [10, 2]
  found = caption_alone(a, VOCABULARY)
  assert found.ids == [1, 10, 3]
  assert found.ids[slice(*found.span)] == [10, 3]


def test_unigram_counts_with_one_added():
  """40 and 41 occur in three train pictures, 42 and 43 in one, 44 twice."""
  table = unigram(PREPARED, VOCABULARY)
  wanted = np.array([4, 4, 2, 2, 3, 1, 1, 1, 1, 1]) / 20
  np.testing.assert_allclose(np.exp(table), wanted)
  nll = unigram_nll(table, np.array([40, 49]), VOCABULARY)
  assert nll == pytest.approx(-np.log(4 / 20) - np.log(1 / 20))
  assert len(unigram(PREPARED, VOCABULARY, split="heldout")) == 10


def test_unigram_of_some_records():
  """`limit` reads evenly spaced records of each source: the first and last."""
  table = unigram(PREPARED, VOCABULARY, limit=1)
  wanted = np.array([2, 2, 1, 1, 3, 1, 1, 1, 1, 1]) / 14
  np.testing.assert_allclose(np.exp(table), wanted)


class Words(TextTokenizer):
  """Decodes ids to letters."""

  def __init__(self):
    pass

  def decode(self, ids):
    return "".join(chr(87 + i) for i in ids)


def test_example_scores():
  """Every picture after its own caption; the mean is over codes."""
  examples = captioned_examples(PREPARED, "train", VOCABULARY)
  scorer = FakeScorer(lambda given, wanted: -float(given[1]))
  scores = example_scores(scorer, examples, Words())
  assert [s.loss for s in scores] == [10, 13, 13, 15]
  assert [s.caption for s in scores] == ["a", "de", "de", "f"]
  assert [s.mean_loss for s in scores] == [5, 6.5, 6.5, 7.5]
  found = mean_loss(scores)
  assert found.value == pytest.approx(51 / 8)
  assert 5 <= found.low <= found.value <= found.high <= 7.5
