"""Checkpoints: what is believed, what is refused, what stays readable.

`fixtures/checkpoint_v1` was written by the first version of the format, with

  python -m tests.train.make_checkpoint_fixture

and is restored here for ever. Never make it anew: a change of the format gets a
number and a fixture of its own beside it.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.models import build_model
from fusionlab.tokenizers import load_tokenizers
from fusionlab.train import checkpoint
from fusionlab.train.optimizer import (
  make_optimizer,
  make_schedule,
  named_leaves,
)
from fusionlab.train.state import (
  TrainState,
  abstract_state,
  init_state,
  stream,
)
from tests.train import fakes

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_v1"


class Run:
  """A tiny experiment and its state, without training."""

  def __init__(self, folder, **flat):
    self.experiment = fakes.experiment_of(folder, **flat)
    data = self.experiment.data
    self.tokenizers = load_tokenizers(data.text_tokenizer, data.image_tokenizer)
    self.model = build_model(self.experiment.model, self.tokenizers.vocabulary)
    schedule = make_schedule(self.experiment.optimizer, 10)
    self.optimizer = make_optimizer(self.experiment.optimizer, schedule)
    self.ema = self.experiment.optimizer.ema_decay > 0

  def forget_paths(self):
    """Leaves this machine's folders out of what is recorded."""
    data = dataclasses.replace(
      self.experiment.data, text_tokenizer="", image_tokenizer=""
    )
    self.experiment = dataclasses.replace(self.experiment, data=data)

  def state(self, step=0) -> TrainState:
    state = init_state(
      self.model.init_params,
      self.optimizer,
      stream(0, "params"),
      ema=self.ema,
    )
    return state.replace(step=jnp.int32(step))

  def abstract(self) -> TrainState:
    return abstract_state(
      self.model.abstract_params(), self.optimizer, ema=self.ema
    )

  def save(self, folder, steps, keep=10):
    saver = checkpoint.Checkpoints(
      folder,
      self.experiment,
      self.tokenizers,
      sources={"fake": "0"},
      group_rows=4,
      keep=keep,
    )
    for step in steps:
      saver.save(self.state(step))
    saver.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with checkpoints of the steps 3 and 6."""
  folder = tmp_path_factory.mktemp("saved")
  run = Run(folder, optimizer__ema_decay=0.9)
  run.save(folder / "work" / "checkpoints", [3, 6])
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  """A copy of it that may be damaged."""
  shutil.copytree(saved / "work", tmp_path / "work")
  return tmp_path / "work"


def assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.smoke
def test_state_comes_back_bit_for_bit(saved):
  """Parameters, moments, average and counters are the saved ones."""
  run = Run(saved, optimizer__ema_decay=0.9)
  path = checkpoint.newest(saved / "work" / "checkpoints")
  assert_equal(
    checkpoint.restore_state(path, run.abstract()), run.state(step=6)
  )


@pytest.mark.smoke
@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/3", "moved"])
def test_load_finds_its_way(copy, part):
  """A workdir, its checkpoints or one folder moved elsewhere all load."""
  if part == "moved":
    (copy / "checkpoints" / "3").rename(copy / "moved")
  loaded = checkpoint.load(copy / part)
  assert loaded.step == (6 if part in ("", "checkpoints") else 3)
  run = Run(copy.parent, optimizer__ema_decay=0.9)
  assert_equal(loaded.params, run.state().params)
  assert named_leaves(loaded.params).keys() == (
    named_leaves(run.state().params).keys()
  )
  assert loaded.tokenizers.hash == run.tokenizers.hash
  assert loaded.experiment.model == run.experiment.model
  assert loaded.ema is not None


@pytest.mark.smoke
def test_incomplete_newest_is_skipped(copy, caplog):
  """Without its checksums a folder was interrupted: the one before counts."""
  (copy / "checkpoints" / "6" / "checksums.json").unlink()
  with caplog.at_level("WARNING"):
    assert checkpoint.newest(copy / "checkpoints").name == "3"
  assert "6 is incomplete: skipped" in caplog.text
  Run(copy.parent).save(copy / "checkpoints", [6])
  assert checkpoint.newest(copy / "checkpoints").name == "6"


def files_of(step):
  return sorted(p for p in step.rglob("*") if p.is_file())


@pytest.mark.smoke
def test_one_flipped_bit_of_any_file_is_found(copy):
  """Each file's damage stops with its name and the way out."""
  step = copy / "checkpoints" / "6"
  for path in files_of(step):
    content = path.read_bytes()
    if not content:
      continue
    middle = len(content) // 2
    path.write_bytes(
      content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    with pytest.raises(UserError) as error:
      checkpoint.load(copy)
    message = str(error.value)
    assert f"move {step} away to resume from step 3" in message
    if path.name != "checksums.json":
      assert str(path) in message
    path.write_bytes(content)
  assert checkpoint.load(copy).step == 6


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_missing_bytes_are_found(copy, damage):
  """A truncated or missing file is named; moving the folder away helps."""
  step = copy / "checkpoints" / "6"
  path = max((step / "params").rglob("*"), key=lambda p: p.stat().st_size)
  if damage == "remove":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(UserError, match=path.name):
    checkpoint.newest(copy / "checkpoints")
  step.rename(copy / "6.corrupted")
  assert checkpoint.newest(copy / "checkpoints").name == "3"


def test_unknown_format_is_one_line(copy):
  """A later version's checkpoint is refused by its number."""
  step = copy / "checkpoints" / "6"
  meta = json.loads((step / "meta.json").read_text())
  (step / "meta.json").write_text(json.dumps({**meta, "format": 99}))
  signed = json.loads((step / "checksums.json").read_text())
  digest = hashlib.sha256((step / "meta.json").read_bytes()).hexdigest()
  signed["sha256"]["meta.json"] = digest
  (step / "checksums.json").write_text(json.dumps(signed))
  with pytest.raises(UserError, match=r"format 99 .* reads format 1"):
    checkpoint.load(copy)


@pytest.mark.parametrize("path", ["nothing", "."])
def test_nothing_to_load(tmp_path, path):
  """A folder without checkpoints says what to give."""
  with pytest.raises(UserError, match="give a workdir"):
    checkpoint.load(tmp_path / path)


def test_other_model_is_refused(saved):
  """The first differing parameter is named with both shapes."""
  run = Run(saved, optimizer__ema_decay=0.9, model__ffn_dim=32)
  path = saved / "work" / "checkpoints" / "6"
  with pytest.raises(UserError, match=r"first .*ffn.*\[.*16.*\].*32"):
    checkpoint.restore_state(path, run.abstract())


def test_retention(tmp_path):
  """The newest `keep` stay."""
  Run(tmp_path).save(tmp_path / "checkpoints", [1, 2, 3, 4], keep=2)
  assert checkpoint.steps_in(tmp_path / "checkpoints") == [3, 4]


def test_meta_says_what_is_inside(saved):
  """Config, vocabulary ranges, versions, paths, seed and groups are there."""
  meta = checkpoint.load(saved / "work").meta
  assert meta["vocabulary"] == {"text": [0, 261], "image": [261, 269]}
  assert meta["group_rows"] == 4
  assert meta["seed"] == 0
  assert meta["packages"]["orbax-checkpoint"]
  assert meta["parameters"]["embed"] == {
    "shape": [269, 16],
    "dtype": "float32",
  }


def test_full_disk_is_the_users_error(tmp_path, monkeypatch):
  """What fails in the background is raised by the next call."""
  run = Run(tmp_path)
  saver = checkpoint.Checkpoints(
    tmp_path / "checkpoints",
    run.experiment,
    run.tokenizers,
    sources={},
    group_rows=4,
    keep=2,
  )

  def full(*unused):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "write_atomic", full)
  saver.save(run.state(1))
  with pytest.raises(UserError, match="No space left"):
    saver.wait()
  saver.close()
  assert checkpoint.newest(tmp_path / "checkpoints") is None


@pytest.mark.smoke
def test_fixture_of_the_first_version():
  """The first version's checkpoint loads, with its numbers."""
  loaded = checkpoint.load(FIXTURE)
  said = json.loads((FIXTURE.parent / "checkpoint_v1.json").read_text())
  assert loaded.step == said["step"]
  sums = {
    name: float(np.abs(np.asarray(leaf, np.float64)).sum())
    for name, leaf in named_leaves(loaded.params).items()
  }
  assert sums == pytest.approx(said["absolute_sums"], rel=1e-12)
  ids = loaded.tokenizers.text.encode("red apple")
  assert ids == said["red apple"]
  assert loaded.meta["ema"]
