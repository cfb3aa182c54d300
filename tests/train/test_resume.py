"""Killed at any moment, a run goes on as if nothing had happened."""

import csv
import json
import os
import random
import signal
import time

import pytest

from fusionlab.train import checkpoint
from tests.train import processes

FLAT = {
  # Every start traces its programs anew, and saving takes longer than a step.
  "model__untie": "",
  "train__num_steps": 24,
  "train__checkpoint_every": 3,
  "train__eval_every": 8,
  "train__keep_checkpoints": 2,
  # What else a step's numbers hang on.
  "train__accumulate": 2,
  "optimizer__ema_decay": 0.9,
  "model__dropout": 0.1,
}


def rows(workdir):
  """metrics.csv by step, without what the clock decides."""
  with open(workdir / "metrics.csv", newline="", encoding="utf-8") as file:
    return {
      row["step"]: {
        k: v for k, v in row.items() if v and not k.startswith("perf/")
      }
      for row in csv.DictReader(file)
    }


def status(workdir):
  return json.loads((workdir / "status.json").read_text())


def running(workdir):
  path = workdir / "status.json"
  return path.exists() and status(workdir)["status"] == "running"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A folder with a run `whole` that nobody killed."""
  folder = tmp_path_factory.mktemp("resume")
  assert processes.run(folder, folder / "whole", FLAT) == 0
  return folder


def test_killed_at_random_moments(uninterrupted):
  """After five SIGKILLs every loss is bit-identical to the whole run's."""
  folder, workdir = uninterrupted, uninterrupted / "killed"
  seed = int.from_bytes(os.urandom(4), "little")
  moments = random.Random(seed)
  kills = 0
  for _ in range(5):
    before = len(rows(workdir)) if (workdir / "metrics.csv").exists() else 0
    process = processes.start(folder, workdir, FLAT, delay=0.1)
    # Rows past the last checkpoint are cut and come again, hence the slack.
    processes.wait_for_rows(workdir, max(before - 3, 0), process)
    time.sleep(moments.uniform(0, 0.25))
    process.kill()
    process.join()
    kills += process.exitcode == -signal.SIGKILL
  assert kills >= 3, f"seed {seed}: the run was too quick to be killed"
  assert processes.run(folder, workdir, FLAT) == 0
  assert rows(workdir) == rows(folder / "whole"), f"seed {seed}"
  assert status(workdir)["status"] == "finished"


@pytest.mark.parametrize(
  ("point", "newest"),
  [
    ("while orbax writes", 3),
    ("before meta", 3),
    ("before checksums", 3),
    ("before deleting", 6),
    ("while deleting", 6),
  ],
)
def test_killed_during_a_save(uninterrupted, point, newest):
  """Whatever the kill tears, the newest believed checkpoint is whole."""
  folder = uninterrupted
  workdir = folder / point.replace(" ", "_")
  flat = {**FLAT, "train__keep_checkpoints": 1}
  code = processes.run(folder, workdir, flat, kill_at=point, delay=0.02)
  assert code == -signal.SIGKILL
  found = checkpoint.newest(workdir / "checkpoints")
  assert found.name == str(newest)
  assert checkpoint.load(found).step == newest
  if point == "before checksums":
    assert processes.run(folder, workdir, flat) == 0
    assert rows(workdir) == rows(folder / "whole")
    left = checkpoint.steps_in(workdir / "checkpoints")
    assert left == [FLAT["train__num_steps"]]


@pytest.mark.smoke
def test_sigterm_saves_and_exits_with_zero(uninterrupted):
  """The preempted run says so, and its continuation changes nothing."""
  folder, workdir = uninterrupted, uninterrupted / "preempted"
  process = processes.start(folder, workdir, FLAT, delay=0.1)
  processes.wait_for_rows(workdir, 4, process)
  process.terminate()
  process.join(60)
  assert process.exitcode == 0
  said = status(workdir)
  assert said["status"] == "preempted"
  assert said["reason"] == "SIGTERM"
  found = checkpoint.newest(workdir / "checkpoints")
  assert found.name == str(said["step"])
  assert 4 <= said["step"] < FLAT["train__num_steps"]
  assert processes.run(folder, workdir, FLAT) == 0
  assert rows(workdir) == rows(folder / "whole")


def test_sigterm_at_random_moments(uninterrupted):
  """During a step, an evaluation or a save: it saves, exits 0 and continues."""
  folder, workdir = uninterrupted, uninterrupted / "terminated"
  seed = int.from_bytes(os.urandom(4), "little")
  moments = random.Random(seed)
  for _ in range(4):
    process = processes.start(folder, workdir, FLAT, delay=0.05)
    # Before that line it has no handler: the system ends it, nothing is lost.
    while not running(workdir):
      assert process.is_alive()
      time.sleep(0.005)
    time.sleep(moments.uniform(0, 3))
    process.terminate()
    process.join(60)
    assert process.exitcode == 0, f"seed {seed}"
    said = status(workdir)
    assert said["status"] in ("preempted", "finished"), f"seed {seed}"
    found = checkpoint.newest(workdir / "checkpoints")
    assert found is None or found.name == str(said["step"]), f"seed {seed}"
  assert processes.run(folder, workdir, FLAT) == 0
  assert rows(workdir) == rows(folder / "whole"), f"seed {seed}"


def test_sigterm_before_the_first_step(uninterrupted):
  """While it still prepares there is nothing to save; it leaves at once."""
  folder, workdir = uninterrupted, uninterrupted / "early"
  process = processes.start(folder, workdir, FLAT, slow_open=30.0)
  until = time.monotonic() + 60
  while not (workdir / "status.json").exists():
    assert time.monotonic() < until
    time.sleep(0.01)
  process.terminate()
  process.join(25)
  assert process.exitcode == 0
  assert status(workdir)["status"] == "preempted"
  assert processes.run(folder, workdir, FLAT) == 0
  assert rows(workdir) == rows(folder / "whole")


def test_a_second_process_is_refused(uninterrupted):
  """Two processes never write one workdir."""
  folder, workdir = uninterrupted, uninterrupted / "shared"
  first = processes.start(folder, workdir, FLAT, delay=0.4)
  processes.wait_for_rows(workdir, 1, first)
  second = processes.run(folder, workdir, FLAT)
  assert first.is_alive()
  first.kill()
  first.join()
  assert second != 0
  log = (folder / "log.txt").read_text()
  assert "another process is training" in log
