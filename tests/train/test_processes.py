"""Several processes on this machine: the same run, however they come and go."""

import csv
import json
import shutil

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.train import checkpoint
from fusionlab.train import workdir as workdirs
from tests.train import fakes, processes

STEPS = 20
FLAT = {
  # Little to trace: every start traces its programs anew.
  "model__kind": "transformer",
  "model__modalities": ("text",),
  "model__towers": (0,),
  "model__untie": "",
  "data__image_tokenizer": "none",
  "data__group_rows": 2,
  "data__prefetch": 0,
  "evaluate__after_training": False,
  "train__num_steps": STEPS,
  "train__schedule_steps": STEPS,
  "train__batch_size": 8,
  "train__checkpoint_every": 4,
  "train__keep_checkpoints": 9,
  "train__peer_timeout": 10.0,
  "mesh__data": 2,
}
# Of the devices' communication failing, of a machine with other work to do.
BOUND = 60


def rows(workdir):
  """metrics.csv by step, without what the clock decides."""
  with open(workdir / "metrics.csv", newline="", encoding="utf-8") as file:
    return {
      int(row["step"]): {
        k: float(v) for k, v in row.items() if v and not k.startswith("perf/")
      }
      for row in csv.DictReader(file)
    }


def assert_close(found, expected):
  """The same metrics of the same steps, up to float32's rounding."""
  assert found.keys() == expected.keys()
  for step, row in expected.items():
    assert found[step].keys() == row.keys()
    for name, value in row.items():
      np.testing.assert_allclose(
        found[step][name], value, rtol=1e-5, err_msg=f"{name} of step {step}"
      )


def documents(workdir, first=0):
  """(step, document, start, stop, pass) of all processes' reads, sorted."""
  found = []
  for path in workdir.parent.glob(f"{workdir.name}_read_*.jsonl"):
    for line in path.read_text().splitlines():
      read = json.loads(line)
      found += [(read["step"], *piece) for piece in read["documents"]]
  return sorted(piece for piece in found if piece[0] >= first)


def status(workdir):
  return json.loads((workdir / "status.json").read_text())


def log(workdir, index):
  return (workdir.parent / f"{workdir.name}_{index}.txt").read_text()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """Starts a job and returns its workdir and exit codes."""
  folder = tmp_path_factory.mktemp("processes")
  fakes.write_documents(folder)
  source = {
    "kind": "jsonl",
    "path": str(folder / "documents.jsonl"),
    "heldout": 0.1,
  }
  always = {
    **FLAT,
    "data__sources": {"documents": source},
    "data__cache_dir": str(folder / "cache"),
  }

  def run(name, count, *, devices=1, only=None, **flat):
    started = processes.start_job(
      folder,
      folder / name,
      count,
      {**always, **flat},
      devices=devices,
      only=only,
    )
    return folder / name, processes.end_job(started, BOUND)

  return run


@pytest.fixture(scope="module")
def alone(job):
  """The run of one process that all others are compared with."""
  workdir, codes = job("alone", 1, mesh__data=1)
  assert codes == [0]
  return workdir


@pytest.fixture(scope="module")
def pair(job, alone):
  """The run of two processes that nobody disturbed."""
  workdir, codes = job("pair", 2)
  assert codes == [0, 0]
  return workdir


def test_two_processes_train_what_one_does(alone, pair):
  """Each reads half the rows; metrics are those of the whole batch."""
  assert_close(rows(pair), rows(alone))
  assert documents(pair) == documents(alone)
  read = [
    len((pair.parent / f"pair_read_{i}.jsonl").read_text().splitlines())
    for i in range(2)
  ]
  assert read == [STEPS, STEPS]
  assert "step" not in log(pair, 1), "one process speaks"
  # One started, and it prepared the data alone.
  prepared = pair.parent / "cache" / "prepared"
  assert len([p for p in prepared.iterdir() if p.is_dir()]) == 1


def test_killed_processes_resume_bit_identically(job, pair):
  """In a step, in a save, the coordinator: others end, say who, and go on."""
  workdir, codes = job("killed", 2, only={1: {"SIGKILL": 9}})
  assert codes == [1, -9]
  assert "error: process 1 of 2 was lost" in log(workdir, 0)
  assert "the same command resumes" in log(workdir, 0)
  said = status(workdir)
  assert said["status"] == "failed"
  assert said["reason"].startswith("process 1 of 2 was lost")
  # The save of 8 began when 4 was whole; it may be too.
  before = int(checkpoint.newest(workdir / "checkpoints").name)
  assert before in (4, 8)

  # The first save is made and the second torn.
  _, codes = job("killed", 2, only={1: {"kill_at": "while orbax writes"}})
  assert codes == [1, -9]
  newest = checkpoint.newest(workdir / "checkpoints")
  assert newest.name == str(before + 4)

  _, codes = job("killed", 2, only={0: {"SIGKILL": 14}})
  assert codes == [-9, 1]
  assert "error: process 0 of 2, which coordinates" in log(workdir, 1)
  said = status(workdir)
  assert said["status"] == "failed"
  assert said["reason"].startswith("process 0 of 2, which coordinates")

  _, codes = job("killed", 2)
  assert codes == [0, 0]
  assert rows(workdir) == rows(pair)
  assert status(workdir)["status"] == "finished"


def test_one_four_and_two_processes_read_every_document_once(job, alone):
  """1 → 4 (FSDP, ended by SIGTERM to one) → 2 of two devices, as one run."""
  workdir = alone.parent / "elastic"
  shutil.copytree(alone, workdir)
  for step in checkpoint.steps_in(workdir / "checkpoints"):
    if step > 4:
      checkpoint.remove(workdir / "checkpoints" / str(step))
  slow = {index: {"delay": 0.25} for index in range(4)}
  slow[2]["SIGTERM"] = 5
  _, codes = job("elastic", 4, only=slow, mesh__fsdp=2)
  assert codes == [0] * 4
  said = status(workdir)
  assert (said["status"], said["reason"]) == ("preempted", "SIGTERM")
  assert 5 < said["step"] < STEPS
  newest = checkpoint.newest(workdir / "checkpoints")
  assert newest.name == str(said["step"])

  _, codes = job("elastic", 2, devices=2, mesh__data=1, mesh__fsdp=4)
  assert codes == [0, 0]
  assert_close(rows(workdir), rows(alone))
  assert documents(workdir) == documents(alone, first=4)


def test_what_one_process_misses_ends_all(job, alone):
  """A mistake that only one host sees; another config on one of them."""
  workdir, codes = job("missing", 2, only={1: {"error": 0}})
  assert codes == [1, 2]
  missing = "a file is missing on this host"
  assert f"error: process 1 of 2: {missing}" in log(workdir, 1)
  assert f"error: process 1 of 2 ended: UserError: {missing}" in log(workdir, 0)
  assert status(workdir)["reason"].endswith(missing)

  other = {1: {"flat": {"train__seed": 3}}}
  workdir, codes = job("differing", 2, only=other)
  assert codes == [1, 2]
  assert "config.train.seed is 3 here and 0 there" in log(workdir, 1)


def test_a_workdir_that_is_not_shared_is_refused(tmp_path, monkeypatch):
  """Orbax would wait for ever for files that other processes do not see."""
  monkeypatch.setattr(workdirs, "_SEEN_WITHIN_S", 0.0)
  monkeypatch.setattr(workdirs.processes, "name", lambda: "process 1 of 2")
  monkeypatch.setattr(workdirs.processes, "is_first", lambda: False)
  with (
    pytest.raises(UserError, match="is another folder here"),
    workdirs.seen_by_all(tmp_path),
  ):
    raise AssertionError("nothing may be trained here")
