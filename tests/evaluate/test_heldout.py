"""Held-out scores: sums over splits, captions' worth, and the table."""

import json

import numpy as np
import pytest
from rich.console import Console

from fusionlab import evaluate as room
from fusionlab.batch import LatentGrid, Vocabulary
from fusionlab.errors import UserError
from fusionlab.evaluate.heldout import (
  CaptionWorth,
  Interrupted,
  caption_worth,
  evaluate,
)
from fusionlab.evaluate.scoring import table_of
from fusionlab.objectives.metrics import Mean
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from fusionlab.tokenizers import Tokenizers
from fusionlab.train import loop
from tests.train import fakes


class Loader:
  """Batches are numbers here; what they score is in the tests."""

  def __init__(self, batches):
    self.batches = batches

  def __len__(self):
    return len(self.batches)

  def __getitem__(self, index):
    return self.batches[index]


@pytest.fixture(autouse=True)
def _numbers_are_batches(monkeypatch):
  monkeypatch.setattr(
    "fusionlab.evaluate.heldout.place_batch",
    lambda batch, mesh: batch,
  )


def score(heldout, uncaptioned, **options):
  """Each batch is a dict metric -> (total, count)."""
  return evaluate(
    lambda params, batch: {
      name: Mean(np.float32(total), np.float32(count))
      for name, (total, count) in batch.items()
    },
    None,
    {name: Loader(batches) for name, batches in heldout.items()},
    {name: Loader(batches) for name, batches in uncaptioned.items()},
    make_mesh(MeshConfig()),
    **{"caption": CaptionWorth("caption_nats_per_picture", 4), **options},
  )


@pytest.mark.smoke
def test_mean_over_tokens_not_over_batches():
  """Totals and counts are summed before they are divided."""
  row = score(
    {
      "a": [{"loss/text": (8.0, 2.0)}, {"loss/text": (1.0, 1.0)}],
      "b": [{"loss/text": (3.0, 1.0)}],
    },
    {},
  )
  assert row["eval/a/loss/text"] == pytest.approx(3.0)
  assert row["eval/b/loss/text"] == pytest.approx(3.0)
  assert row["eval/loss/text"] == pytest.approx(12 / 4)


@pytest.mark.smoke
def test_caption_nats_per_picture():
  """(image loss without the caption - with it) / pictures, pooled too."""
  row = score(
    {
      "a": [{"loss/image": (10.0, 8.0)}],  # two pictures
      "text": [{"loss/text": (10.0, 8.0), "loss/image": (0.0, 0.0)}],
    },
    {"a": [{"loss/image": (9.0, 4.0)}, {"loss/image": (9.0, 4.0)}]},
  )
  assert row["eval/a/caption_nats_per_picture"] == pytest.approx((18 - 10) / 2)
  assert row["eval/caption_nats_per_picture"] == pytest.approx(4.0)
  assert "eval/text/caption_nats_per_picture" not in row
  assert "eval/text/loss/image" not in row


def test_caption_mse_gain():
  """Of continuous pictures the difference of the means themselves."""
  grid = LatentGrid(side=4, channels=2)
  vocabulary = Vocabulary(("text", "image"), (9, 1), grids=(None, grid))
  tokenizers = Tokenizers(text=None, image=None, vocabulary=vocabulary, hash="")
  row = score(
    {"a": [{"loss/image": (3.0, 4.0)}]},
    {"a": [{"loss/image": (2.0, 2.0)}]},
    caption=caption_worth(tokenizers),
  )
  assert row["eval/a/caption_mse_gain"] == row["eval/caption_mse_gain"] == 0.25
  assert not [name for name in row if "nats" in name]


def test_limit_takes_the_first_batches():
  """At intervals only so many batches of each loader are scored."""
  batches = [{"loss/text": (float(n), 1.0)} for n in range(1, 6)]
  row = score({"a": batches}, {}, limit=2)
  assert row["eval/loss/text"] == pytest.approx(1.5)
  assert score({"a": batches}, {})["eval/loss/text"] == pytest.approx(3.0)


def test_interruption_reports_nothing():
  """An evaluation that was asked to stop raises instead of half a score."""
  asked = iter([False, True])
  with pytest.raises(Interrupted):
    score(
      {"a": [{"loss/text": (1.0, 1.0)}] * 3},
      {},
      should_stop=lambda: next(asked),
    )


def test_table_has_a_column_per_split():
  """Pooled values stand in the column `all`."""
  row = score(
    {"a": [{"loss/text": (1.0, 2.0)}], "b": [{"loss/text": (3.0, 2.0)}]}, {}
  )
  console = Console(record=True, width=100)
  console.print(table_of(row, 7))
  shown = console.export_text()
  for cell in ("loss/text", "a", "b", "all", "0.5", "1.5", "1"):
    assert cell in shown


def test_evaluate_a_workdir(tmp_path, monkeypatch):
  """The score of a workdir is the run's own last held-out score."""
  monkeypatch.undo()
  monkeypatch.setattr("fusionlab.train.setup.open_data", fakes.open_fake_data)
  experiment = fakes.experiment_of(tmp_path, train__num_steps=4)
  loop.train(experiment, str(tmp_path / "run"))
  result = room.run(str(tmp_path / "run"))
  written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert written["metrics"] == result["metrics"]
  assert result["step"] == 4
  assert room.evaluated_at(str(tmp_path / "run")) == 4
  assert room.evaluated_at(str(tmp_path)) is None
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  last = json.loads(lines[-1])
  for name in ("eval/loss/text", "eval/caption_nats_per_picture"):
    assert result["metrics"][name] == last[name]
  heldout = room.heldout_at(str(tmp_path / "run"), 4)
  assert room.heldout_at(str(tmp_path / "run"), 3) is None
  assert set(heldout) == {n for n in result["metrics"] if n[:5] == "eval/"}
  # What the run's end left is not computed again.
  reused = room.run(
    str(tmp_path / "run"), heldout={**heldout, "eval/loss": 9.0}
  )
  assert reused["metrics"] == {**heldout, "eval/loss": 9.0}
  with pytest.raises(UserError, match="no checkpoint of step 3; it has 4"):
    room.run(str(tmp_path / "run"), step=3)
