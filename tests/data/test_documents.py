"""Documents: draws by hash, lengths without records, ids in the drawn order."""

import numpy as np
import pytest

from fusionlab.data import documents as docs
from fusionlab.data.documents import Chances
from tests.data import fakes

CHANCES = Chances(image_first=0.5, caption_drop=0.1, first_caption=0.5)


def _draw(counts, documents, passes, seed=3, chances=CHANCES):
  return docs.draw(
    counts, documents, passes, seed=seed, source=11, chances=chances
  )


def _ids(records, counts, documents, draws):
  parts = docs.offsets(counts.parts[documents])
  return [
    docs.document_ids(
      records[d],
      fakes.VOCABULARY,
      reversed=bool(draws.reversed[i]),
      dropped=bool(draws.dropped[i]),
      alternative=draws.alternative[parts[i] : parts[i + 1]],
    )
    for i, d in enumerate(documents)
  ]


@pytest.mark.smoke
def test_lengths_from_counts_equal_the_documents_own():
  counts = fakes.random_counts(200, np.random.default_rng(0))
  documents = np.random.default_rng(1).permutation(200)
  draws = _draw(counts, documents, documents % 3)
  lengths = docs.document_lengths(counts, documents, draws, 2)
  ids = _ids(fakes.records_of(counts), counts, documents, draws)
  modality = [fakes.VOCABULARY.modality_of(i) for i in ids]
  np.testing.assert_array_equal(
    lengths, [np.bincount(m, minlength=2) for m in modality]
  )
  assert draws.dropped.any()
  assert draws.reversed.any()


def test_draws_do_not_depend_on_order_or_company():
  counts = fakes.random_counts(300, np.random.default_rng(0))
  documents = np.arange(300)
  passes = documents % 4
  every = _draw(counts, documents, passes)
  start = docs.offsets(counts.parts)
  for chosen in (documents[::-1], np.array([7]), np.array([5, 5, 299, 0])):
    some = _draw(counts, chosen, passes[chosen])
    np.testing.assert_array_equal(some.reversed, every.reversed[chosen])
    np.testing.assert_array_equal(some.dropped, every.dropped[chosen])
    expected = [every.alternative[start[d] : start[d + 1]] for d in chosen]
    np.testing.assert_array_equal(some.alternative, np.concatenate(expected))


def test_draws_have_their_probabilities_and_differ_between_passes_and_seeds():
  n = 20_000
  counts = fakes.picture_counts(n, np.random.default_rng(0), captions=5)
  documents = np.arange(n)
  zero = np.zeros(n, np.int64)
  draws = _draw(counts, documents, zero)
  caption = draws.alternative[::2]
  assert abs(draws.reversed.mean() - 0.5) < 0.02
  assert abs(draws.dropped.mean() - 0.1) < 0.01
  np.testing.assert_allclose(
    np.bincount(caption) / n, [0.5, 0.125, 0.125, 0.125, 0.125], atol=0.02
  )
  assert abs(np.corrcoef(draws.reversed, draws.dropped)[0, 1]) < 0.03
  for other in (
    _draw(counts, documents, zero + 1),
    _draw(counts, documents, zero, seed=4),
  ):
    assert abs((draws.reversed == other.reversed).mean() - 0.5) < 0.02
    assert not np.array_equal(caption, other.alternative[::2])


def test_expected_lengths_are_the_mean_over_passes():
  counts = fakes.random_counts(200, np.random.default_rng(2))
  documents = np.arange(200)
  total = np.zeros(2)
  for p in range(200):
    draws = _draw(counts, documents, np.full(200, p))
    total += docs.document_lengths(counts, documents, draws, 2).sum(0)
  expected = docs.expected_lengths(counts, CHANCES, 2)
  np.testing.assert_allclose(total / 200, expected, rtol=5e-3)


def test_largest_lengths_bound_every_draw_and_are_reached():
  counts = fakes.random_counts(100, np.random.default_rng(5))
  documents = np.arange(100)
  largest = docs.largest_lengths(counts, 2)
  seen = np.zeros_like(largest)
  for p in range(100):
    draws = _draw(counts, documents, np.full(100, p))
    seen = np.maximum(seen, docs.document_lengths(counts, documents, draws, 2))
  assert (seen <= largest).all()
  assert (seen == largest).mean() > 0.95


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("reversed", "dropped", "alternative", "expected"),
  [
    (False, False, 0, "b 10 11 B 300 301 E e"),
    (True, False, 1, "b B 300 301 E 12 e"),
    (False, True, 0, "b B 300 301 E e"),
    (True, True, 1, "b B 300 301 E e"),
  ],
)
def test_document_is_bos_parts_eos_in_the_drawn_order(
  reversed, dropped, alternative, expected
):
  record = docs.Record(
    key="k",
    part_modality=np.array([0, 1], np.int32),
    part_alternatives=np.array([2, 1], np.int32),
    lengths=np.array([2, 1, 2], np.int32),
    ids=np.array([10, 11, 12, 300, 301], np.int32),
  )
  ids = docs.document_ids(
    record,
    fakes.VOCABULARY,
    reversed=reversed,
    dropped=dropped,
    alternative=np.array([alternative, 0]),
  )
  v = fakes.VOCABULARY
  names = {"b": v.bos, "e": v.eos, "B": v.begin[1], "E": v.end[1]}
  assert ids.tolist() == [int(names.get(w, w)) for w in expected.split()]
  assert ids.dtype == np.int32


def test_only_captioned_pictures_are_turned_or_lose_their_text():
  counts = fakes.random_counts(400, np.random.default_rng(0))
  draws = _draw(
    counts, np.arange(400), np.zeros(400, np.int64), chances=Chances(1, 1, 0)
  )
  for n in range(400):
    kinds = counts.part_modality[
      counts.part_start[n] : counts.part_start[n + 1]
    ]
    captioned = kinds.tolist() == [0, 1]
    assert draws.reversed[n] == draws.dropped[n] == captioned
    assert counts.pictured[n] == (1 in kinds)
  assert 0 < draws.dropped.sum() < 400


def test_uniform_numbers_look_uniform_over_consecutive_counters():
  numbers = docs.uniform(1, 2, np.arange(100_000))
  assert numbers.min() >= 0
  assert numbers.max() < 1
  histogram = np.histogram(numbers, 50, (0, 1))[0] / 2000
  assert (abs(histogram - 1) < 0.12).all()
  assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
