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
