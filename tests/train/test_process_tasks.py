"""Two processes with towers: they start, stop and score as one process does."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionlab.train import checkpoint
from fusionlab.train.optimizer import named_leaves
from tests.train import processes
from tests.train.test_processes import documents, log, rows, status

# One process wrote it: two towers, and their tokenizers.
FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_v1"
STEPS = 12
FLAT = {
  "init__checkpoint": str(FIXTURE),
  "model__towers": (0, 1),
  "model__dim": 8,
  "model__num_heads": 1,
  "model__ffn_dim": 8,
  "data__text_tokenizer": str(FIXTURE / "tokenizers" / "text.json"),
  "data__image_tokenizer": str(FIXTURE / "tokenizers" / "image.safetensors"),
  "data__group_rows": 2,
  "data__prefetch": 0,
  # Little beside the parameters that are loaded.
  "optimizer__learning_rate": 1e-3,
  "evaluate__examples": 0,
  "evaluate__after_training": False,
  "train__num_steps": STEPS,
  "train__schedule_steps": STEPS,
  "train__batch_size": 8,
  "train__peer_timeout": 10.0,
}
TWO = {"mesh__data": 2}
BOUND = 120  # seconds of a job, of a machine with other work to do


def assert_close(found, expected):
  """The same names and values, up to float32's rounding."""
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    # The worth of a caption is a difference of two losses.
    np.testing.assert_allclose(
      found[name], value, rtol=1e-5, atol=1e-5, err_msg=name
    )


def of(row, prefix):
  return {name: value for name, value in row.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """Starts a job on captioned pictures; returns its workdir."""
  folder = tmp_path_factory.mktemp("tasks")
  pictures = folder / "pictures"
  pictures.mkdir()
  rng = np.random.default_rng(0)
  for number in range(48):
    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(pictures / f"{number}.png")
    (pictures / f"{number}.txt").write_text("abcdefgh"[: number % 8 + 1])
  source = {"kind": "image_folder", "path": str(pictures), "heldout": 0.2}
  always = {
    **FLAT,
    "data__sources": {"pictures": source},
    "data__cache_dir": str(folder / "cache"),
  }

  def run(name, count, *, only=None, **flat):
    started = processes.start_job(
      folder, folder / name, count, {**always, **flat}, only=only
    )
    codes = processes.end_job(started, BOUND)
    said = [log(folder / name, index) for index in range(count)]
    assert codes == [0] * count, "\n".join(said)
    return folder / name

  return run


@pytest.fixture(scope="module")
def alone(job):
  """One process's run."""
  return job("alone", 1)


def test_two_processes_score_what_one_trained(job, alone):
  """`--mode=evaluate`: what training said at its end; one writes and speaks."""
  job("alone", 2, only={n: {"mode": "evaluate"} for n in range(2)}, **TWO)
  found = json.loads((alone / "evaluation.json").read_text())
  assert found["step"] == STEPS
  said = of(rows(alone)[STEPS], "eval/")
  assert {"eval/heldout/loss/text", "eval/heldout/loss/image"} <= said.keys()
  assert_close(of(found["metrics"], "eval/"), said)
  assert "held-out, step 12" in log(alone, 0)
  assert "held-out" not in log(alone, 1), "one process speaks"


def test_two_processes_start_from_a_checkpoint_and_stop_in_time(job, alone):
  """`init.checkpoint` as on one process; `max_seconds` on all at one step."""
  # Twelve steps of half a second are more than six seconds, however fast.
  slow = {n: {"delay": 0.5} for n in range(2)}
  pair = job("pair", 2, only=slow, train__max_seconds=6.0, **TWO)
  said = status(pair)
  assert (said["status"], said["reason"]) == ("finished", "max_seconds")
  step = said["step"]
  assert 0 < step < STEPS
  # What one process saves alone is never whole.
  assert checkpoint.newest(pair / "checkpoints").name == str(step)
  assert rows(pair).keys() == set(range(1, step + 1))
  for n, row in rows(pair).items():
    assert_close(of(row, "train/"), of(rows(alone)[n], "train/"))
  assert {"train/loss/text", "train/loss/image"} <= rows(pair)[1].keys()
  read = [piece for piece in documents(alone) if piece[0] < step]
  assert documents(pair)[: len(read)] == read
  before, after = checkpoint.load(FIXTURE), checkpoint.load(pair)
  trained = named_leaves(after.params)
  for name, leaf in named_leaves(before.ema).items():
    assert 0 < np.abs(trained[name] - leaf).max() < 0.05, name
