"""From a folder of pictures to scores, samples and a report, end to end."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from experiments import run as command
from experiments.command_line import Options
from fusionlab.data.config import DataConfig, SourceConfig
from fusionlab.evaluate.config import EvaluateConfig
from tests.train import fakes


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run on sixty pictures of 4 x 4 pixels, finished, scored and reported."""
  folder = tmp_path_factory.mktemp("scoring")
  rng = np.random.default_rng(0)
  (folder / "pictures").mkdir()
  for n in range(60):
    picture = rng.integers(0, 255, (6, 4, 3), np.uint8)
    Image.fromarray(picture).save(folder / "pictures" / f"{n}.png")
    (folder / "pictures" / f"{n}.txt").write_text(f"no {n}")
  experiment = fakes.experiment_of(folder, train__num_steps=2)
  source = SourceConfig(
    kind="image_folder", path=str(folder / "pictures"), heldout=0.4
  )
  data = dataclasses.replace(
    experiment.data,
    sources={"mine": source},
    cache_dir=str(folder / "cache"),
    layout="auto",
  )
  experiment = dataclasses.replace(
    experiment,
    data=data,
    evaluate=EvaluateConfig(
      examples=8,
      drawn=5,
      matched=6,
      grid=2,
      num_samples=2,
      top_k=0,
      guidance=2.0,
    ),
  )
  assert isinstance(data, DataConfig)
  options = Options("train", str(folder / "run"), experiment)
  assert command.run(options) == 0
  return folder / "run", options


def test_a_finished_run_is_scored(workdir):
  """Every kind of score for every split, with interval, count and chance."""
  result = json.loads((workdir[0] / "evaluation.json").read_text())
  for split in ("train", "heldout"):
    for name in (
      "image_nll_per_code",
      "image_unigram_nll_per_code",
      "caption_nll_per_token",
      "caption_to_image/top1",
      "image_to_caption/top1",
      "own_picture/top1",
      "own_picture/code_agreement",
    ):
      metric = f"eval/{split}/{name}"
      low, high = result["intervals"][metric]
      assert low <= result["metrics"][metric] <= high
      drawn = 5 if "own_picture" in name else 8
      assert result["counts"][metric] == (6 if "to_" in name else drawn)
    assert result["chance"][f"eval/{split}/caption_to_image/top1"] == 1 / 6
    assert result["chance"][f"eval/{split}/own_picture/top1"] == 1 / 60
  assert result["metrics"]["eval/bits_per_byte/text"] > 0
  assert result["step"] == 2


def test_its_samples_are_files(workdir):
  """Grid, descriptions and extremes name pictures that are there."""
  samples = workdir[0] / "samples"
  said = json.loads((samples / "samples.json").read_text())
  assert said["bank"] == 60 and said["settings"]["guidance"] == 2.0
  row = said["grids"]["train"][1]
  assert row["caption"].startswith("no ") and len(row["ranks"]) == 2
  number = row["caption"].removeprefix("no ")
  assert row["key"] == f"{number}.png" or row["key"] == number
  for file in (row["picture"], row["reconstruction"], *row["generated"]):
    assert Image.open(samples / file).size == (4, 4)
  assert len(said["described"]["heldout"][0]["generated"]) == 2
  assert "train" not in said["described"]
  most, least = (
    [e["nll_per_code"] for e in said["likelihood"]["train"][w]]
    for w in ("most", "least")
  )
  assert most == sorted(most) and least == sorted(least)[::-1]
  assert most[0] <= least[0]
  assert not list(workdir[0].glob(".samples-*"))


def test_its_report_shows_them(workdir):
  page = (workdir[0] / "report.html").read_text()
  assert page.count("data:image/") > 10
  assert "no " in page


def test_starts_are_recorded_and_a_finished_run_is_not_scored_again(workdir):
  folder, options = workdir
  before = (folder / "evaluation.json").stat().st_mtime_ns
  assert command.run(options) == 0
  assert (folder / "evaluation.json").stat().st_mtime_ns == before
  starts = [
    json.loads(line)
    for line in (folder / "starts.jsonl").read_text().splitlines()
  ]
  assert [s["step"] for s in starts] == [0, 2]
  assert set(starts[0]) == {"time", "step", "commit", "command", "device"}
