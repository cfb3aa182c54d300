"""Several configs over several seeds: run by run, resumable, to a table."""

import dataclasses
import json
import shutil

import pytest

from configs import compare_lmfusion, compare_mot, compare_transfusion
from experiments import compare
from experiments.compare import Comparison
from fusionlab.config import from_mapping, to_mapping
from fusionlab.errors import ConfigError, UserError
from fusionlab.train import setup
from tests.train import fakes, processes


def comparison_of(folder, **changes) -> Comparison:
  flat = {"train__num_steps": 6, "train__eval_every": 2}
  dense = fakes.experiment_of(folder, model__untie="", **flat)
  mot = fakes.experiment_of(folder, **flat)
  mapping = {
    "control": "dense",
    "seeds": (0,),
    "experiments": {"dense": to_mapping(dense), "mot": to_mapping(mot)},
  }
  return from_mapping(Comparison, mapping | changes)


def test_it_trains_what_is_missing_and_writes_a_table(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(setup, "open_data", fakes.open_fake_data)
  timed = []

  def time_steps(comparison, workdir):
    assert workdir.is_dir()
    timed.append(comparison)
    quartiles = {"low": 1.0, "median": 1.25, "high": 1.5}
    both = {"seconds": quartiles, "over_control": quartiles}
    return dict.fromkeys(comparison.experiments, both)

  monkeypatch.setattr(compare, "time_steps", time_steps)
  comparison, workdir = comparison_of(tmp_path), tmp_path / "runs"
  assert compare.run(comparison, workdir) == 0
  results = json.loads((workdir / "comparison.json").read_text())
  dense, mot = (results["experiments"][n] for n in ("dense", "mot"))
  # The last evaluation is of all data and on no curve.
  assert dense["losses"]["image"]["curve"]["steps"] == [2, 4]
  assert dense["losses"]["image"]["s"] == [1.0]
  assert mot["losses"]["image"]["final_loss"] != [
    dense["losses"]["image"]["final_loss"]
  ]
  table = (workdir / "comparison.md").read_text()
  assert "| mot |" in table and "seeds [0]" in table and "commit" in table
  assert (workdir / "comparison.svg").read_text().count("<svg") == 1
  assert "<html" in (workdir / "comparison.html").read_text()
  assert "run 2 of 2" in capsys.readouterr().out
  assert "1.25 (1.00 to 1.50)" in table
  # Again: nothing is trained or timed; one run away, that one is.
  assert compare.run(comparison, workdir) == 0
  assert len(timed) == 1
  assert "run " not in capsys.readouterr().out
  shutil.rmtree(workdir / "mot_s0")
  assert compare.run(comparison, workdir) == 0
  out = capsys.readouterr().out
  assert "run 2 of 2" in out and "run 1" not in out
  # A folder of another config is not taken for this one's.
  other = comparison_of(tmp_path)
  changed = dataclasses.replace(
    other.experiments["mot"],
    optimizer=dataclasses.replace(
      other.experiments["mot"].optimizer, weight_decay=0.3
    ),
  )
  other = dataclasses.replace(
    other, experiments={**other.experiments, "mot": changed}
  )
  with pytest.raises(UserError, match="weight_decay"):
    compare.run(other, workdir)


def test_one_starts_from_another_and_scores_stand_beside_losses(
  tmp_path, monkeypatch
):
  """The start is of the same seed; what others start from has no s."""
  monkeypatch.setattr(setup, "open_data", fakes.open_fake_data)
  monkeypatch.setattr(compare, "_ROUNDS", 1)
  flat = {"train__num_steps": 6, "train__eval_every": 2}
  init = {"init__checkpoint": "first"}
  experiments = {
    "first": to_mapping(fakes.experiment_of(tmp_path, **flat)),
    "second": to_mapping(fakes.experiment_of(tmp_path, **flat, **init)),
  }
  mapping = {
    "control": "second",
    "seeds": (1,),
    "metrics": ("eval/bits_per_byte/text",),
    "experiments": experiments,
  }
  workdir = tmp_path / "runs"
  comparison = from_mapping(Comparison, mapping)
  assert compare.run(comparison, workdir) == 0
  recorded = json.loads((workdir / "second_s1" / "config.json").read_text())
  assert recorded["init"]["checkpoint"] == str(workdir / "first_s1")
  results = json.loads((workdir / "comparison.json").read_text())
  first, second = (results["experiments"][n] for n in ("first", "second"))
  assert first["losses"]["text"]["s"] == []
  assert second["losses"]["text"]["s"] == [1.0]
  (bits,) = second["metrics"]["eval/bits_per_byte/text"]
  scores = json.loads((workdir / "second_s1" / "evaluation.json").read_text())
  assert bits == scores["metrics"]["eval/bits_per_byte/text"]
  assert "bits per byte, text" in (workdir / "comparison.md").read_text()
  misspelt = dataclasses.replace(comparison, metrics=("eval/bits_per_byte",))
  with pytest.raises(UserError, match="did you mean 'eval/bits_per_byte/text'"):
    compare.run(misspelt, workdir)
  mapping["experiments"]["first"]["init"]["checkpoint"] = "second"
  with pytest.raises(
    ConfigError, match="starts from another experiment itself"
  ):
    from_mapping(Comparison, mapping)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"control": "dens"}, "did you mean 'dense'"),
    ({"seeds": (1, 1)}, "must be different"),
    ({"experiments": {}}, "give two or more"),
  ],
)
def test_mistakes_are_named(tmp_path, changes, said):
  with pytest.raises(ConfigError, match=said):
    comparison_of(tmp_path, **changes)


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("max_seconds", 5.0, "cannot be compared"),
    ("eval_every", 0, "gives no curve"),
    ("eval_every", 6, "gives no curve"),
  ],
)
def test_runs_must_have_curves_to_the_same_step(tmp_path, key, value, said):
  mapping = to_mapping(comparison_of(tmp_path))
  mapping["experiments"]["mot"]["train"][key] = value
  with pytest.raises(ConfigError, match=said):
    from_mapping(Comparison, mapping)


def test_different_flops_are_refused(tmp_path):
  mapping = to_mapping(comparison_of(tmp_path))
  mapping["experiments"]["mot"]["model"]["ffn_dim"] = 64
  comparison = from_mapping(Comparison, mapping)
  with pytest.raises(UserError, match="different model FLOPs"):
    compare.run(comparison, tmp_path / "runs")
  assert not (tmp_path / "runs").exists()


def test_the_shipped_comparison_is_one_of_equal_flops():
  comparison = from_mapping(Comparison, compare_mot.get_config().to_dict())
  compare.check_flops(comparison)
  assert len(comparison.seeds) >= 3
  assert list(comparison.experiments) == ["dense", "ffn", "ffn_qkv", "mot"]


@pytest.mark.parametrize("config", [compare_lmfusion, compare_transfusion])
def test_the_other_comparisons_are_whole(config):
  comparison = from_mapping(Comparison, config.get_config("10").to_dict())
  assert len(comparison.seeds) >= 3
  if comparison.equal_flops:
    compare.check_flops(comparison)
  for name, experiment in comparison.experiments.items():
    assert experiment.train.num_steps == (30 if name == "text_model" else 10)


def test_a_misspelt_key_is_one_line_and_nothing_is_written(tmp_path):
  words = ["--config=configs/compare_mot.py", "--config.seds=1"]
  result = processes.command(
    tmp_path, "experiments.compare", *words, f"--workdir={tmp_path}/w"
  )
  assert result.returncode == 2
  assert result.stderr.strip() == (
    "error: unknown key config.seds, did you mean 'seeds'?"
  )
  assert not (tmp_path / "w").exists()
