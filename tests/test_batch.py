"""A batch for library users says what its rows hold."""

import numpy as np
import pytest

from fusionlab.batch import Vocabulary, batch_of_ids
from fusionlab.errors import UserError

VOCABULARY = Vocabulary(modalities=("text", "image"), sizes=(20, 8))
DOCUMENTS = ([1, 7, 3, 20, 27, 4, 2], [1, 9, 2])


@pytest.mark.smoke
def test_rows_hold_the_documents_and_predict_their_next_ids():
  batch = batch_of_ids(DOCUMENTS, VOCABULARY, towers=(0, 1))
  assert batch.tokens.shape == (2, 7)
  for row, ids in enumerate(DOCUMENTS):
    n = len(ids)
    assert batch.tokens[row, :n].tolist() == list(ids)
    assert batch.target[row, : n - 1].tolist() == list(ids[1:])
    assert batch.weight[row].tolist() == [1.0] * (n - 1) + [0.0] * (8 - n)
    assert batch.segment[row].tolist() == [1] * n + [0] * (7 - n)
    assert batch.k_end[row, :n].tolist() == list(range(1, n + 1))
  assert batch.modality[0].tolist() == [0, 0, 0, 1, 1, 0, 0]


def test_every_token_has_a_place_in_its_tower():
  batch = batch_of_ids(DOCUMENTS, VOCABULARY, towers=(0, 1), row_length=9)
  layout = batch.layout
  assert layout is not None
  assert [take.shape for take in layout.take] == [(1, 16), (1, 2)]
  image = np.flatnonzero(batch.modality.reshape(-1) == 1)
  assert layout.take[1][0].tolist() == image.tolist()
  assert sorted(layout.place[0].tolist()) == list(range(18))


def test_one_tower_needs_no_layout():
  assert batch_of_ids(DOCUMENTS, VOCABULARY, towers=(0, 0)).layout is None


@pytest.mark.parametrize(
  ("documents", "row_length", "said"),
  [
    ([], 0, "needs 1 to"),
    ([[1], []], 0, "needs 1 to"),
    ([[1, 2, 3]], 2, "needs 1 to 2"),
    ([[1, 28]], 0, "0 to 27"),
    ([[1, -1]], 0, "0 to 27"),
  ],
)
def test_ids_that_make_no_batch_are_refused(documents, row_length, said):
  with pytest.raises(UserError, match=said):
    batch_of_ids(documents, VOCABULARY, towers=(0, 1), row_length=row_length)


TEXT = Vocabulary(("text",), (20,))
GROWN = Vocabulary(
  ("text", "image", "speech"), (24, 8, 6), begin=(0, 3, 20), end=(0, 4, 21)
)


def test_a_grown_vocabulary_says_where_old_ids_are():
  places = GROWN.places_of(VOCABULARY)
  assert places.dtype == np.int64
  assert places.tolist() == [*range(20), *range(24, 32)]
  assert GROWN.places_of(TEXT).tolist() == list(range(20))
  assert GROWN.places_of(GROWN).tolist() == list(range(GROWN.size))


@pytest.mark.parametrize(
  ("old", "said"),
  [
    (Vocabulary(("text", "vision"), (20, 8)), "unknown modality 'vision'"),
    (Vocabulary(("text", "image"), (20, 9)), "8 ids of image, the older one 9"),
    (Vocabulary(("text", "image"), (20, 7)), "8 ids of image, the older one 7"),
    (Vocabulary(("text",), (25,)), "24 ids of text, the older one 25"),
    (Vocabulary(("image",), (8,)), "cannot continue one whose text is 'image'"),
    (Vocabulary(("text",), (20,), bos=9), "bos at id 1, the older one at id 9"),
    (
      Vocabulary(("text", "image"), (20, 8), begin=(0, 9)),
      "begin of image at id 3, the older one at id 9",
    ),
  ],
)
def test_what_is_no_continuation_is_refused(old, said):
  with pytest.raises(UserError, match=said) as caught:
    GROWN.places_of(old)
  assert "\n" not in str(caught.value)


def test_specials_are_those_of_documents_and_blocks():
  assert TEXT.begin == TEXT.end == (0,)
  assert TEXT.specials == (0, 1, 2)
  assert VOCABULARY.specials == (0, 1, 2, 3, 4)
  shared = Vocabulary(("text",), (20,), pad=7, bos=7, eos=7)
  assert shared.specials == (7,)
