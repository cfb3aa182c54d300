"""The loop in one process: how runs end, resume and are refused."""

import csv
import functools
import json

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.train import checkpoint, loop
from tests.train import fakes

pytestmark = pytest.mark.usefixtures("fake_data")


def train(folder, **flat):
  workdir = folder / "run"
  assert loop.train(fakes.experiment_of(folder, **flat), str(workdir)) == 0
  return workdir


def read_json(path):
  return json.loads(path.read_text())


def columns(workdir):
  with open(workdir / "metrics.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run of 12 steps."""
  folder = tmp_path_factory.mktemp("finished")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("fusionlab.train.setup.open_data", fakes.open_fake_data)
    train(folder, train__eval_every=6)
  return folder


@pytest.mark.smoke
def test_files_of_a_run(finished):
  """config, environment, status, metrics and checkpoints are all there."""
  workdir = finished / "run"
  config = read_json(workdir / "config.json")
  assert config["train"]["schedule_steps"] == 12
  assert config["data"]["group_rows"] == 4
  environment = read_json(workdir / "environment.json")
  assert environment["packages"]["jax"]
  assert environment["devices"]["platform"] == "cpu"
  assert read_json(workdir / "status.json") == {
    "status": "finished",
    "step": 12,
    "reason": "num_steps",
  }
  assert checkpoint.steps_in(workdir / "checkpoints") == [4, 8, 12]


@pytest.mark.smoke
def test_names_of_metrics(finished):
  """The names that others script against, and where they are filled."""
  rows = columns(finished / "run")
  assert [row["step"] for row in rows] == [str(n) for n in range(1, 13)]
  assert next(iter(rows[0])) == "step"
  for name in (
    "train/loss",
    "train/loss/text",
    "train/loss/image",
    "train/accuracy/image",
    "train/bits_per_byte/text",
    "train/grad_norm",
    "train/learning_rate",
    "data/epoch",
    "data/fill/text",
  ):
    assert all(row[name] for row in rows), name
  for name in (
    "eval/loss/text",
    "eval/loss/image",
    "eval/heldout_picture/loss/image",
    "eval/heldout_place/loss/text",
    "eval/caption_nats_per_picture",
    "eval/heldout_picture/caption_nats_per_picture",
  ):
    assert [row["step"] for row in rows if row[name]] == ["6", "12"], name
  assert all(row["perf/tokens_per_s"] for row in rows[1:])
  assert all(0 <= float(row["perf/data_wait"]) <= 1 for row in rows[1:])
  assert "perf/mfu" not in rows[0]  # no peak is known on CPU
  assert "eval/heldout_place/caption_nats_per_picture" not in rows[0]


def test_more_steps_keep_the_schedule(tmp_path):
  """`num_steps` may grow; the schedule stays as long as at the start."""
  derived = {"train__schedule_steps": 0}
  train(tmp_path, train__num_steps=4, **derived)
  workdir = train(tmp_path, train__num_steps=6, train__log_every=2, **derived)
  assert read_json(workdir / "config.json")["train"]["schedule_steps"] == 4
  rates = {r["step"]: float(r["train/learning_rate"]) for r in columns(workdir)}
  assert list(rates) == ["1", "2", "3", "4", "6"]
  assert rates["6"] == pytest.approx(1e-2 * 0.02)


@pytest.mark.parametrize(
  ("flat", "key", "old", "new"),
  [
    ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate", 0.01, 0.5),
    ({"train__seed": 3}, "train.seed", 0, 3),
    ({"train__batch_size": 8}, "train.batch_size", 4, 8),
    ({"train__schedule_steps": 9}, "train.schedule_steps", 12, 9),
    ({"model__dim": 32}, "model.dim", 16, 32),
    ({"data__caption_drop": 0.5}, "data.caption_drop", 0.1, 0.5),
  ],
)
def test_other_config_is_refused(finished, flat, key, old, new):
  """What decides the numbers may not change; key and both values are named."""
  before = (finished / "run" / "status.json").read_text()
  with pytest.raises(UserError) as error:
    train(finished, train__eval_every=6, **flat)
  assert f"config.{key}: {old!r} -> {new!r}" in str(error.value)
  assert "\n" not in str(error.value)
  assert (finished / "run" / "status.json").read_text() == before


def test_foreign_folder_is_refused(tmp_path):
  """A non-empty folder without config.json is not touched."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "thesis.tex").write_text("x")
  with pytest.raises(UserError, match=r"not empty \(thesis.tex"):
    train(tmp_path)
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_file_as_workdir_is_refused(tmp_path):
  """A file is not a folder."""
  (tmp_path / "run").write_text("x")
  with pytest.raises(UserError, match="is a file"):
    train(tmp_path)


def test_max_seconds_ends_cleanly(tmp_path):
  """Out of time is finished: saved, scored, and the next start goes on."""
  workdir = train(tmp_path, train__num_steps=10**6, train__max_seconds=0.01)
  said = read_json(workdir / "status.json")
  assert (said["status"], said["reason"]) == ("finished", "max_seconds")
  assert checkpoint.newest(workdir / "checkpoints").name == str(said["step"])
  assert columns(workdir)[-1]["eval/loss/text"]
  workdir = train(tmp_path, train__num_steps=said["step"] + 2)
  assert read_json(workdir / "status.json")["reason"] == "num_steps"


def test_not_finite_stops_with_a_dump(tmp_path, monkeypatch):
  """Nothing poisoned is saved; batch and metrics of the step are kept."""
  monkeypatch.setattr(
    "fusionlab.train.setup.open_data",
    lambda *a, **k: fakes.open_fake_data(*a, nan_at=(5,), **k),
  )
  with pytest.raises(UserError, match=r"not finite at step 6.*dump"):
    train(tmp_path, train__checkpoint_every=6)
  workdir = tmp_path / "run"
  said = read_json(workdir / "status.json")
  assert said["status"] == "failed"
  assert checkpoint.newest(workdir / "checkpoints") is None
  dump = workdir / "dump" / "step_6"
  batch = np.load(dump / "batch_0.npz")
  assert np.isnan(batch["weight"]).any()
  assert batch["layout/place"].shape[0] == 1
  assert read_json(dump / "metrics.json")["train/loss"] == "nan"


def test_not_finite_skips(tmp_path, monkeypatch):
  """'skip' goes on and counts."""
  monkeypatch.setattr(
    "fusionlab.train.setup.open_data",
    lambda *a, **k: fakes.open_fake_data(*a, nan_at=(5,), **k),
  )
  workdir = train(tmp_path, train__num_steps=8, train__on_nonfinite="skip")
  rows = columns(workdir)
  assert [r["train/skipped_steps"] for r in rows] == [""] * 5 + ["1"] * 3
  assert np.isfinite(float(rows[-1]["train/loss"]))


def test_an_exception_is_a_failed_run(tmp_path, monkeypatch):
  """status.json says what happened, and the exception goes on."""

  def broken(*unused, **also_unused):
    raise RuntimeError("no such disk")

  monkeypatch.setattr("fusionlab.train.setup.open_data", broken)
  with pytest.raises(RuntimeError):
    train(tmp_path)
  said = read_json(tmp_path / "run" / "status.json")
  assert said["status"] == "failed"
  assert said["reason"] == "RuntimeError: no such disk"
  monkeypatch.setattr("fusionlab.train.setup.open_data", fakes.open_fake_data)
  train(tmp_path, train__num_steps=2)


def test_mesh_may_change(tmp_path):
  """A run of one device goes on with two data shards."""
  train(tmp_path, train__num_steps=4)
  workdir = train(tmp_path, train__num_steps=6, mesh__fsdp=2)
  assert read_json(workdir / "status.json")["step"] == 6


def test_other_data_is_refused(tmp_path, monkeypatch):
  """Sources that changed since the checkpoint would shift every batch."""
  train(tmp_path, train__num_steps=2)
  changed = functools.partial(fakes.open_fake_data, fingerprint="1")
  monkeypatch.setattr("fusionlab.train.setup.open_data", changed)
  with pytest.raises(UserError, match=r"the source\(s\) fake changed"):
    train(tmp_path, train__num_steps=4)


def test_a_misspelt_writer_ties_the_folder_to_nothing(tmp_path):
  """The corrected command goes on in the same workdir."""
  with pytest.raises(UserError, match="'csv'"):
    train(tmp_path, train__num_steps=2, train__writers="csvv")
  train(tmp_path, train__num_steps=2, train__writers="csv")


def test_a_finished_run_started_again_changes_nothing(tmp_path):
  """No step, no second evaluation, no second row."""
  workdir = train(tmp_path, train__num_steps=2)
  before = (workdir / "metrics.jsonl").read_bytes()
  train(tmp_path, train__num_steps=2)
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_profiler_window(tmp_path):
  """A trace of the asked steps lies under profile/."""
  workdir = train(
    tmp_path,
    train__num_steps=5,
    train__profile_start=3,
    train__profile_steps=2,
  )
  assert list((workdir / "profile").rglob("*.xplane.pb"))
