"""Preparation: once, whole or not at all, and damage is noticed."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fusionlab.batch import Vocabulary
from fusionlab.data import preparation
from fusionlab.data.config import SourceConfig
from fusionlab.data.preparation import Prepared, prepare
from fusionlab.data.sources import Example, Part
from fusionlab.errors import UserError
from tests.data import fakes


def _source(path: str = "") -> fakes.FakeSource:
  return fakes.FakeSource(SourceConfig(path=path), "fake")


def _prepare(cache: Path, source=None, tokenizers=None) -> Prepared:
  return prepare(
    source or _source(), tokenizers or fakes.fake_tokenizers(), cache,
    name="fake",
  )  # fmt: skip


@pytest.mark.smoke
def test_records_and_counts_are_the_tokenised_source(tmp_path):
  prepared = _prepare(tmp_path)
  assert prepared.splits == ("train", "heldout_picture", "heldout_text")
  by_split: dict[str, list[Example]] = {}
  for example in _source().examples():
    by_split.setdefault(example.split, []).append(example)
  for split, examples in by_split.items():
    records, counts = prepared.records(split), prepared.counts(split)
    assert len(records) == len(counts) == len(examples)
    for n, example in enumerate(examples):
      record = records[n]
      assert record.key == example.key
      expected = []
      for part in example.parts:
        for alternative in part.alternatives:
          if isinstance(alternative, str):
            expected.append([fakes.SPECIALS + b for b in alternative.encode()])
          else:
            expected.append(
              fakes.TEXT_IDS + alternative[:, 0, 0].astype(int) // 16
            )
      np.testing.assert_array_equal(record.ids, np.concatenate(expected))
      assert record.lengths.tolist() == [len(e) for e in expected]
      modality = [int(p.modality == "image") for p in example.parts]
      assert record.part_modality.tolist() == modality
      parts = slice(counts.part_start[n], counts.part_start[n + 1])
      first = counts.alternative_start[parts.start]
      last = counts.alternative_start[parts.stop]
      assert counts.part_modality[parts].tolist() == modality
      assert counts.lengths[first:last].tolist() == record.lengths.tolist()
      assert (
        counts.part_alternatives[parts].tolist()
        == record.part_alternatives.tolist()
        == [len(p.alternatives) for p in example.parts]
      )
    assert records[0] is records[0], "a small split stays in memory"


def test_second_time_reads_no_example(tmp_path):
  first = _prepare(tmp_path)

  class Closed(fakes.FakeSource):
    def examples(self):
      raise AssertionError("read again")

  again = _prepare(tmp_path, Closed(SourceConfig(), "fake"))
  assert again.folder == first.folder


def test_folder_depends_on_source_and_tokenizers(tmp_path):
  folders = {
    _prepare(tmp_path).folder,
    _prepare(tmp_path, _source("other")).folder,
    _prepare(tmp_path, tokenizers=fakes.fake_tokenizers("other")).folder,
  }
  assert len(folders) == 3


@pytest.mark.parametrize(
  "name",
  ["counts.npz", "manifest.json", "dataset_info.json", "array_record"],
)
def test_damage_is_refused_and_names_the_folder(tmp_path, name):
  folder = _prepare(tmp_path).folder
  path = next(p for p in sorted(folder.rglob("*")) if name in p.name)
  whole = path.read_bytes()
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 4
  path.write_bytes(damaged)
  with pytest.raises(UserError, match="delete that folder") as error:
    prepared = _prepare(tmp_path)
    # What array_record holds is checked as it is read.
    for split in prepared.splits:
      list(prepared.records(split))
  assert str(folder) in str(error.value)
  assert "\n" not in str(error.value)
  path.write_bytes(whole[:-3])
  with pytest.raises(UserError, match="delete that folder"):
    _prepare(tmp_path)
  path.unlink()
  with pytest.raises(UserError, match="delete that folder"):
    _prepare(tmp_path)


def test_manifest_of_another_source_is_refused(tmp_path):
  folder = _prepare(tmp_path).folder
  other = _prepare(tmp_path, _source("other")).folder
  preparation.shutil.rmtree(folder)
  other.rename(folder)
  with pytest.raises(UserError, match="another fingerprint"):
    _prepare(tmp_path)


def test_manifest_says_what_it_was_made_from(tmp_path):
  manifest = json.loads(
    (_prepare(tmp_path).folder / "manifest.json").read_text()
  )
  assert manifest["source"] == "fake"
  assert manifest["fingerprint"] == "fake-"
  assert manifest["tokenizers"] == "both"
  assert manifest["splits"]["heldout_picture"] == {
    "records": 4,
    "tokens_of_all_alternatives": {
      "text": sum(
        len(t.encode())
        for i in (9, 19, 29, 39)
        for t in (f"picture {i}", f"bild nummer {i}", f"画 {i}")
      ),
      "image": 32,
    },
  }


class _Slow(fakes.FakeSource):
  """Takes long over its last example."""

  def examples(self):
    yield from super().examples()
    time.sleep(30)


def _prepare_slowly(cache: Path) -> None:
  _prepare(cache, _Slow(SourceConfig(), "fake"))


def test_killed_preparation_leaves_nothing_that_is_believed(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(preparation, "EXAMPLES_AT_ONCE", 8)
  process = multiprocessing.get_context("fork").Process(
    target=_prepare_slowly, args=(tmp_path,)
  )
  process.start()
  root = tmp_path / "prepared"
  until = time.monotonic() + 20
  while not list(root.glob(".fake-*/*.spool")):
    assert time.monotonic() < until
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  assert not list(root.glob("fake-*"))
  assert len(_prepare(tmp_path).records("train")) == 91


def test_of_two_at_a_time_the_first_to_finish_is_used(tmp_path):
  class Overtaken(fakes.FakeSource):
    def examples(self):
      yield from super().examples()
      self.winner = _prepare(tmp_path).folder
      self.made = (self.winner / "manifest.json").stat().st_mtime_ns

  source = Overtaken(SourceConfig(), "fake")
  prepared = _prepare(tmp_path, source)
  assert prepared.folder == source.winner
  assert (prepared.folder / "manifest.json").stat().st_mtime_ns == source.made
  assert [p.name for p in (tmp_path / "prepared").iterdir()] == [
    prepared.folder.name
  ]


def test_a_process_with_a_cache_of_its_own_prepares_itself(
  tmp_path, monkeypatch
):
  # On another host than process 0, whose preparation it does not see.
  monkeypatch.setattr(preparation, "from_first", lambda make: None)
  assert len(_prepare(tmp_path).records("train")) == 91


class _Examples(fakes.FakeSource):
  given: tuple[Example, ...] = ()

  def examples(self):
    yield from self.given


@pytest.mark.parametrize(
  ("examples", "message"),
  [
    ((), "has no examples"),
    (
      (Example("k", "train", (Part("text", ("a",)),)),) * 2,
      "two examples with the key 'k'",
    ),
    (
      (Example("k", "train", (Part("smell", ("a",)),)),),
      "no tokenizer for the modality 'smell'",
    ),
  ],
)
def test_bad_examples_are_refused_and_leave_nothing(
  tmp_path, examples, message
):
  source = _Examples(SourceConfig(), "fake")
  source.given = examples
  with pytest.raises(UserError, match=message) as error:
    _prepare(tmp_path, source)
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "prepared").iterdir())


def test_cache_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to the cache"):
    _prepare(tmp_path / "file")


def test_large_split_is_read_at_random_and_not_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, "MEMORY_BYTES", 0)
  records = _prepare(tmp_path).records("train")
  assert records[5].key == "p5"
  assert records[5] is not records[5]


def test_pictures_are_left_out_where_there_is_text_only(tmp_path, capsys):
  both = fakes.fake_tokenizers()
  alone = dataclasses.replace(
    both,
    image=None,
    vocabulary=Vocabulary(("text",), (fakes.TEXT_IDS,)),
    hash="alone",
  )
  source = fakes.FakeSource(SourceConfig(), "mine")
  prepared = prepare(source, alone, tmp_path, name="mine")
  assert "101 examples, their text alone" in capsys.readouterr().err
  whole = prepare(source, both, tmp_path, name="mine")
  for split in whole.splits:
    counts = prepared.counts(split)
    assert len(counts) == len(whole.counts(split))
    assert not counts.part_modality.any()
  record, full = (p.records("train")[0] for p in (prepared, whole))
  assert record.key == full.key
  np.testing.assert_array_equal(record.ids, full.ids[: len(record.ids)])
