"""The plan: every document once, none torn, counts within the layout."""

import dataclasses
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fusionlab.data import documents as docs
from fusionlab.data import plan as planning
from fusionlab.data.documents import Chances, Counts
from fusionlab.data.plan import Plan, Stream, plan_epoch
from fusionlab.errors import UserError
from tests.data import fakes

MODALITIES = ("text", "image")
CHANCES = Chances(image_first=0.5, caption_drop=0.1, first_caption=0.5)


def _auto(streams, row_length=512, group_rows=8, align=1):
  expected = sum(
    s.weight * docs.expected_lengths(s.counts, CHANCES, 2) for s in streams
  )
  return planning.layout_counts(
    "auto",
    MODALITIES,
    expected,
    np.array([1, 64]),
    row_length=row_length,
    group_rows=group_rows,
    align=align,
  )


def _plan(streams, counts, epoch=0, seed=0, **options) -> Plan:
  options = {
    "chances": CHANCES,
    "row_length": 512,
    "group_rows": 8,
    "lookahead": 512,
    **options,
  }
  return plan_epoch(streams, seed=seed, epoch=epoch, counts=counts, **options)


def _lengths(streams, plan, seed=0, chances=CHANCES):
  """Tokens of each modality of each piece's whole document."""
  lengths = np.zeros((len(plan.source), 2), np.int64)
  for index, stream in enumerate(streams):
    here = plan.source == index
    draws = docs.draw(
      stream.counts,
      plan.document[here],
      plan.passes[here],
      seed=seed,
      source=docs.stream_key(stream.name),
      chances=chances,
    )
    lengths[here] = docs.document_lengths(
      stream.counts, plan.document[here], draws, 2
    )
  return lengths


def _check(streams, plan, counts, row_length, seed=0):
  """Every invariant that holds of any plan."""
  whole = _lengths(streams, plan, seed)
  size = plan.stop - plan.start
  row = np.repeat(np.arange(len(plan.row_start) - 1), np.diff(plan.row_start))
  assert plan.row_start[-1] == len(size)
  assert len(plan.row_start) - 1 == plan.num_groups * plan.group_rows
  assert (size > 0).all()
  assert (np.bincount(row, size) <= row_length).all()
  text = whole[:, 1] == 0
  # Whatever holds a picture is whole; a text in several pieces is covered.
  assert (plan.start[~text] == 0).all()
  assert (plan.stop[~text] == whole[~text].sum(1)).all()
  limit = min(row_length, counts[0])
  pieces: dict[tuple, list] = {}
  for n in range(len(size)):
    key = (plan.source[n], plan.document[n], plan.passes[n])
    pieces.setdefault(key, []).append((plan.start[n], plan.stop[n], n))
  for found in pieces.values():
    found.sort()
    total = whole[found[0][2]].sum()
    assert found[0][0] == 0
    assert found[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    if text[found[0][2]]:
      assert len(found) == -(-total // limit)
      assert all(stop - start == limit for start, stop, _ in found[:-1])
    else:
      assert len(found) == 1
  tokens = np.stack([np.where(text, size, whole[:, 0]), whole[:, 1]], 1)
  used = np.zeros_like(plan.used)
  np.add.at(used, row // plan.group_rows, tokens)
  np.testing.assert_array_equal(used, plan.used)
  assert (used <= np.array(counts)).all()
  assert used.any(axis=1).all()
  return pieces


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_every_document_exactly_as_often_as_its_weight_says(data):
  rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
  weights = data.draw(
    st.lists(
      st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 0.3]), min_size=1, max_size=3
    )
  )
  streams = [
    Stream(f"s{i}", fakes.random_counts(int(rng.integers(1, 40)), rng), w)
    for i, w in enumerate(weights)
  ]
  group_rows = data.draw(st.sampled_from([1, 2, 4]))
  size = group_rows * 128
  image = data.draw(st.integers(32, size - 60))
  counts = (size - image, image)
  read = [np.zeros(len(s.counts), int) for s in streams]
  for epoch in range(4):
    plan = _plan(
      streams,
      counts,
      epoch,
      row_length=128,
      group_rows=group_rows,
      lookahead=data.draw(st.sampled_from([1, 8, 100])),
    )
    pieces = _check(streams, plan, counts, 128)
    for source, document, passes in pieces:
      read[source][document] += 1
      stream = streams[source]
      n = len(stream.counts)
      low, high = (round(e * stream.weight * n) for e in (epoch, epoch + 1))
      assert low // n <= passes <= (high - 1) // n
    for source, stream in enumerate(streams):
      done = round((epoch + 1) * stream.weight * len(stream.counts))
      assert read[source].sum() == done
      # Passes come one after another, each a permutation.
      assert read[source].max() - read[source].min() <= 1
      assert read[source].min() == done // len(stream.counts)


@pytest.mark.smoke
def test_default_mixture_fills_97_percent():
  streams = fakes.default_mixture()
  counts = _auto(streams)
  assert sum(counts) == 8 * 512
  assert counts[1] % 64 == 0
  plan = _plan(streams, counts)
  fill = (plan.used / np.array(counts)).mean(0)
  assert (fill >= 0.97).all(), fill


@pytest.mark.parametrize("weights", [(1, 0.5), (1, 1), (1, 2)])
def test_fill_stays_high_for_other_weights(weights):
  mixture = fakes.default_mixture(1500, 1500, seed=1)
  streams = [
    dataclasses.replace(s, weight=w)
    for s, w in zip(mixture, weights, strict=True)
  ]
  counts = _auto(streams)
  plan = _plan(streams, counts, seed=1)
  _check(streams, plan, counts, 512, seed=1)
  used = plan.used
  # What whole pictures alone cost at this share of pictures, and packing.
  expected = sum(
    s.weight * docs.expected_lengths(s.counts, CHANCES, 2) for s in streams
  )
  pictures = expected[1] / expected.sum() * sum(counts) / 64
  whole = min(pictures / counts[1] * 64, counts[1] / 64 / pictures, 1)
  assert (used.sum(0) / (np.array(counts) * len(used))).min() > whole - 0.045


def test_same_arguments_same_plan_and_others_differ():
  streams = fakes.default_mixture(300, 300)
  counts = _auto(streams)
  plan = _plan(streams, counts)
  again = _plan(streams, counts)
  for field in dataclasses.fields(Plan):
    np.testing.assert_array_equal(
      getattr(plan, field.name), getattr(again, field.name)
    )
  for other in (
    _plan(streams, counts, epoch=1),
    _plan(streams, counts, seed=1),
  ):
    assert not np.array_equal(plan.document, other.document)


def test_a_source_keeps_its_order_when_another_is_added():
  streams = fakes.default_mixture(50, 50)

  def order(streams):
    source, document, passes = planning.epoch_documents(
      streams, seed=0, epoch=0
    )
    here = source == 0
    return document[here], passes[here]

  np.testing.assert_array_equal(order(streams), order(streams[:1]))


def test_sources_are_mixed_evenly_over_the_epoch():
  streams = fakes.default_mixture(1000, 1000)
  source, _, _ = planning.epoch_documents(streams, seed=0, epoch=0)
  for part in np.array_split(source, 20):
    assert abs((part == 0).mean() - 0.8) < 0.03


def test_no_document_waits_for_ever():
  streams = fakes.default_mixture(2000, 2400)
  counts = _auto(streams)
  source, document, passes = planning.epoch_documents(streams, seed=0, epoch=0)
  arrival = {
    key: i for i, key in enumerate(zip(source, document, passes, strict=True))
  }
  plan = _plan(streams, counts)
  keys = zip(plan.source, plan.document, plan.passes, strict=True)
  when = np.array([arrival[k] for k in keys])
  row = np.repeat(np.arange(len(plan.row_start) - 1), np.diff(plan.row_start))
  late = row / row.max() - when / when.max()
  assert np.quantile(late, 0.99) < 0.2


def test_one_pass_in_stored_order_without_shuffle():
  streams = [Stream("t", fakes.text_counts([5, 6, 7]), 1.0, np.array([0, 2]))]
  source, document, passes = planning.epoch_documents(
    streams, seed=0, epoch=0, shuffle=False
  )
  assert source.tolist() == passes.tolist() == [0, 0]
  assert document.tolist() == [0, 2]


@hypothesis.given(
  rows=st.lists(st.floats(0.01, 6.0), min_size=1, max_size=12),
  row_length=st.sampled_from([8, 64, 512]),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_long_texts_are_cut_into_the_fewest_pieces(rows, row_length):
  total = [1 + int(r * row_length) for r in rows]
  streams = [Stream("t", fakes.text_counts(total), 1.0)]
  counts = (2 * row_length, 0)
  plan = _plan(streams, counts, row_length=row_length, group_rows=2)
  _check(streams, plan, counts, row_length)
  text_places = (row_length // 2, 2 * row_length - row_length // 2)
  plan = _plan(streams, text_places, row_length=row_length, group_rows=2)
  _check(streams, plan, text_places, row_length)


def test_long_texts_fill_their_rows():
  """Texts of a third more than a row: a rest shares its row with others."""
  streams = [Stream("t", fakes.text_counts([700] * 600), 1.0)]
  plan = _plan(streams, (8 * 512, 0), row_length=512, group_rows=8)
  assert plan.used[:-1, 0].mean() / (8 * 512) > 0.9


@pytest.mark.parametrize(
  ("layout", "align", "expected"),
  [
    ("text=0.4 image=0.6", 1, (410, 614)),
    ("image=0.6 text=0.4", 16, (416, 608)),
    ("text=1 image=0", 1, (1024, 0)),
    ("auto", 1, (512, 512)),
    ("auto", 128, (512, 512)),
  ],
)
def test_layout_counts(layout, align, expected):
  counts = planning.layout_counts(
    layout,
    MODALITIES,
    np.array([510.0, 514.0]),
    np.array([1, 64]),
    row_length=256,
    group_rows=4,
    align=align,
  )
  assert counts == expected


@pytest.mark.parametrize("tokens", [(1.0, 0.0), (9.0, 1.0), (1.0, 9.0), (3, 2)])
@pytest.mark.parametrize("align", [1, 16])
def test_auto_layout_is_near_the_mixture_and_whole(tokens, align):
  expected = 1e6 * np.array(tokens, float)
  counts = planning.layout_counts(
    "auto",
    MODALITIES,
    expected,
    np.array([1, 64]),
    row_length=512,
    group_rows=8,
    align=align,
  )
  assert sum(counts) == 4096
  assert all(c % align == 0 for c in counts)
  share = expected / expected.sum() * 4096
  assert (abs(np.array(counts) - share) <= 64 + align).all()
  assert (counts[1] == 0) == (tokens[1] == 0)


@pytest.mark.parametrize(
  ("layout", "message"),
  [
    ("text=0.4 image=0.7", r"0\.4 \+ 0\.7 = 1\.1, not 1"),
    ("text=0.4 imag=0.6", "unknown modality 'imag', did you mean 'image'"),
    ("text=0.4", "no fraction for image"),
    ("text=a image=0.6", "'a' is not a number"),
    ("text=-0.4 image=1.4", "-0.4 is not between 0 and 1"),
    ("half", "unknown modality 'half'"),
    ("", "no fraction for text, image"),
  ],
)
def test_bad_layouts_are_refused_in_one_line(layout, message):
  with pytest.raises(UserError, match=message) as error:
    planning.layout_counts(
      layout,
      MODALITIES,
      np.array([1.0, 1.0]),
      np.array([1, 64]),
      row_length=512,
      group_rows=1,
    )
  assert "\n" not in str(error.value)
  assert "auto" in str(error.value)


def test_alignment_that_does_not_divide_is_refused():
  with pytest.raises(
    UserError, match="align=48 does not divide the 512 tokens"
  ):
    planning.layout_counts(
      "auto",
      MODALITIES,
      np.array([1.0, 1.0]),
      np.array([1, 64]),
      row_length=512,
      group_rows=1,
      align=48,
    )


def _picture(caption: int, codes: int) -> Counts:
  return Counts(
    parts=np.array([2], np.int32),
    part_modality=np.array([0, 1], np.int32),
    part_alternatives=np.array([1, 1], np.int32),
    lengths=np.array([caption, codes], np.int32),
  )


@pytest.mark.parametrize(
  ("caption", "codes", "counts", "message"),
  [
    (500, 64, (1024, 1024), "504 text + 64 image = 568 tokens, a row has"),
    (10, 64, (992, 32), "needs 64 image places, a group has 32 of 1024"),
    (200, 64, (100, 924), "needs 204 text places, a group has 100 of 1024"),
  ],
)
def test_pictures_that_fit_nowhere_are_refused_with_the_arithmetic(
  caption, codes, counts, message
):
  streams = [Stream("mine", _picture(caption, codes), 1.0)]
  with pytest.raises(UserError, match=re.escape(message)) as error:
    planning.check_fit(streams, MODALITIES, counts, 512)
  assert "'mine'" in str(error.value)
  planning.check_fit(streams, MODALITIES, (1024, 1024), 1024)


def test_text_without_places_is_refused():
  streams = [Stream("mine", fakes.text_counts([5]), 1.0)]
  with pytest.raises(UserError, match="leaves 0 places for text"):
    planning.check_fit(streams, MODALITIES, (0, 1024), 512)


def test_plan_is_small_and_picklable():
  import pickle

  streams = fakes.default_mixture(500, 500)
  plan = _plan(streams, _auto(streams))
  assert len(pickle.dumps(plan)) < 60 * len(plan.source)
