"""open_data: the room's door, from a config to loaders."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fusionlab.data
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from tests.data import fakes


def _experiment(cache, **data: Any) -> Experiment:
  return Experiment.from_mapping(
    {
      "model": {
        "kind": "transformer",
        "towers": data.pop("towers", (0, 1)),
        "untie": data.pop("untie", "ffn"),
      },
      "objective": {"kind": "next_token"},
      "data": {
        "sources": {"mine": {"kind": "tests.data.fakes:FakeSource"}},
        "cache_dir": str(cache),
        "row_length": 64,
        **data,
      },
      "train": {"batch_size": 4},
    }
  )


def _open(cache, *, group_rows=2, process_index=0, process_count=1, **data):
  return fusionlab.data.open_data(
    _experiment(cache, **data),
    fakes.fake_tokenizers(),
    process_index=process_index,
    process_count=process_count,
    group_rows=group_rows,
  )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.mark.smoke
def test_train_and_heldout_have_one_shape_and_layout(cache):
  data = _open(cache)
  assert sum(data.layout_counts) == 2 * 64
  assert set(data.heldout) == {"heldout_picture", "heldout_text"}
  assert set(data.uncaptioned) == {"heldout_picture"}
  for loader in (
    data.train, *data.heldout.values(), *data.uncaptioned.values()
  ):  # fmt: skip
    assert loader.layout_counts == data.layout_counts
    batch = loader[0]
    assert batch.tokens.shape == (4, 64)
    takes = [take.shape for take in batch.layout.take]
    assert takes == [(2, c) for c in data.layout_counts]


def _documents(loader):
  for batch in loader.iterate():
    for row, segment in zip(batch.tokens, batch.segment, strict=True):
      for s in range(1, segment.max() + 1):
        yield row[segment == s].tolist()


def test_heldout_pictures_come_once_after_their_first_caption(cache):
  data = _open(cache)
  v = fakes.VOCABULARY

  def spelt(text):
    return [fakes.SPECIALS + b for b in text.encode()]

  found = list(_documents(data.heldout["heldout_picture"]))
  assert len(found) == 4
  starts = [d[: d.index(v.begin[1])] for d in found]
  expected = [[v.bos, *spelt(f"picture {i}")] for i in (9, 19, 29, 39)]
  assert sorted(starts) == sorted(expected)
  without = list(_documents(data.uncaptioned["heldout_picture"]))
  assert all(d[:2] == [v.bos, v.begin[1]] and len(d) == 12 for d in without)
  codes = [sorted(tuple(d[-10:-2]) for d in x) for x in (found, without)]
  assert codes[0] == codes[1]


def test_heldout_does_not_reach_train(cache):
  data = _open(cache)
  heldout = {tuple(d) for d in _documents(data.uncaptioned["heldout_picture"])}
  train = set()
  for step in range(data.train.steps_in_epoch(0)):
    batch = data.train[step]
    for row, segment in zip(batch.tokens, batch.segment, strict=True):
      for s in range(1, segment.max() + 1):
        ids = row[segment == s]
        train.add(tuple(ids[ids >= fakes.TEXT_IDS]))
  assert not {tuple(d[2:10]) for d in heldout} & train
  assert len(train) > 30


def test_token_bytes_cover_the_shared_vocabulary(cache):
  data = _open(cache)
  assert data.token_bytes.shape == (fakes.VOCABULARY.size,)
  assert data.token_bytes.dtype == np.int32
  assert data.token_bytes.sum() == 256
  assert data.token_bytes[: fakes.SPECIALS].sum() == 0


@pytest.mark.parametrize(
  "options", [{"untie": ""}, {"towers": (0, 0), "untie": "ffn"}]
)
def test_dense_models_read_the_same_rows_without_a_layout(cache, options):
  dense, routed = _open(cache, **options), _open(cache)
  assert dense.train[0].layout is None
  np.testing.assert_array_equal(dense.train[3].tokens, routed.train[3].tokens)


def test_weight_zero_leaves_a_source_alone(cache):
  sources = {
    "mine": {"kind": "tests.data.fakes:FakeSource"},
    "other": {"kind": "no.such:Source", "weight": 0.0},
  }
  assert set(_open(cache, sources=sources).prepared) == {"mine"}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"row_length": 12}, "a row has config.data.row_length=12"),
    ({"layout": "text=0.99 image=0.01"}, "needs 8 image places, a group has 1"),
    ({"layout": "text=1"}, "no fraction for image"),
    ({"group_rows": 4, "process_count": 2}, "2 processes cannot share"),
    ({"sources": {"mine": {"kind": "openmojy"}}}, "did you mean 'openmoji'"),
  ],
)
def test_bad_data_is_refused_in_one_line(cache, options, message):
  with pytest.raises(UserError, match=message) as error:
    _open(cache, **options)
  assert "\n" not in str(error.value)


def test_cache_folder_follows_config_then_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("FUSIONLAB_CACHE", str(tmp_path))
  assert fusionlab.data.cache_folder("") == tmp_path
  assert fusionlab.data.cache_folder("/x") == fusionlab.data.cache_folder("/x")
  assert str(fusionlab.data.cache_folder("/x")) == "/x"
  monkeypatch.delenv("FUSIONLAB_CACHE")
  assert fusionlab.data.cache_folder("").parts[-2:] == (".cache", "fusionlab")


def test_reading_a_config_imports_no_data_library(root):
  code = (
    "import sys, json, fusionlab.data.config;"
    "print(json.dumps([m for m in sys.modules]))"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, check=True
  )
  loaded = json.loads(run.stdout)
  assert not {"grain", "tensorflow_datasets", "tensorflow"} & set(loaded)
