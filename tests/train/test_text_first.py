"""A run that grows a text model of its own trains that first, once."""

import numpy as np
import pytest

from fusionlab.errors import ConfigError
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train import loop, text_first
from fusionlab.train import workdir as workdirs
from fusionlab.train.config import InitConfig
from fusionlab.train.optimizer import named_leaves
from tests.train import fakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text_first")
  fakes.write_documents(folder)
  return folder


def experiment(folder, **flat):
  options = {
    "data__sources": {
      "a": {"kind": "jsonl", "path": str(folder / "documents.jsonl")}
    },
    "data__cache_dir": str(folder / "cache"),
    "init__text_steps": 3,
    "init__add_towers": "image:text",
    "optimizer__freeze": "text",
    "train__num_steps": 2,
    "train__schedule_steps": 2,
    "train__checkpoint_every": 0,
  }
  return fakes.experiment_of(folder, **(options | flat))


def test_the_text_tower_is_the_text_model(folder, capsys):
  """Trained in the same command; the next start finds it."""
  run = folder / "run"
  assert loop.train(experiment(folder), str(run)) == 0
  first = run / text_first.FOLDER
  assert f"first 3 steps on text alone, in {first}" in capsys.readouterr().out
  base, grown = checkpoints.load(first), checkpoints.load(run)
  assert (base.step, grown.step) == (3, 2)
  assert base.experiment.model.modalities == ("text",)
  before = named_leaves(base.params)
  for name, leaf in named_leaves(grown.params).items():
    if "/text/" in name:
      source = before[name.replace("/text/", "/shared/")]
      np.testing.assert_array_equal(leaf, source)
  # The folder is recorded nowhere: a run may be moved before it goes on.
  run = run.rename(folder / "moved")
  assert loop.train(experiment(folder, train__num_steps=3), str(run)) == 0
  assert workdirs.finished_at(run) == 3
  assert "on text alone" not in capsys.readouterr().out


def test_a_text_model_that_was_stopped_goes_on_first(
  folder, capsys, monkeypatch
):
  """The run itself does not begin on half a text model."""
  run = folder / "stopped"
  reasons = iter(["", "SIGTERM"])
  whole = loop._Run._end_reason
  monkeypatch.setattr(
    loop._Run, "_end_reason", lambda self, step: next(reasons)
  )
  assert loop.train(experiment(folder), str(run)) == 0
  assert workdirs.finished_at(run / text_first.FOLDER) is None
  assert not (run / "config.json").exists()
  monkeypatch.setattr(loop._Run, "_end_reason", whole)
  assert loop.train(experiment(folder), str(run)) == 0
  assert workdirs.finished_at(run) == 2
  assert capsys.readouterr().out.count("first 3") == 2


def test_one_start_at_a_time():
  config = InitConfig(text_steps=3, checkpoint="x")
  with pytest.raises(ConfigError, match="makes a checkpoint and"):
    config.check("config.init")
  with pytest.raises(ConfigError, match=r"with config\.init\.text_steps use"):
    InitConfig(text_steps=3, copy_towers="a:b").check("config.init")
