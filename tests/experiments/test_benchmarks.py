"""The benchmarks run, at sizes that measure nothing."""

import json

import pytest

from experiments.benchmarks.timing import Quartiles, interleaved, ratios
from tests.train import processes

CONFIG = """
from configs import mot_chameleon

def get_config():
  config = mot_chameleon.get_config()
  with config.unlocked():
    config.data.sources = {"factbook": config.data.sources.factbook}
  config.model.update(dim=16, num_layers=1, num_heads=2, vocab_size=0)
  config.data.row_length = 64
  return config
"""


@pytest.fixture
def program(tmp_path):
  """Runs a benchmark as a command."""
  return lambda name, *words: processes.command(
    tmp_path, f"experiments.benchmarks.{name}", *words
  )


@pytest.fixture
def result(program):
  """Runs a benchmark and returns its last line."""

  def run(name: str, *words: str) -> dict:
    done = program(name, *words, "--repeats=2", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

  return run


def test_turns_are_shuffled_and_counted_alike():
  """Every round calls each function once; two rounds are not counted."""
  calls = []
  seconds = interleaved(
    {name: lambda name=name: calls.append(name) for name in "abc"}, repeats=8
  )
  rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
  assert len(rounds) == 10
  assert all(sorted(turn) == list("abc") for turn in rounds)
  assert len(set(rounds)) > 1
  assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
    "abc", 8
  )


def test_a_ratio_is_taken_within_its_round():
  """A slow round is slow for both and changes no ratio."""
  over = ratios({"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 4.0]}, "a")
  assert over["b"] == Quartiles(2.0, 2.0, 2.0)
  assert over["a"].median == 1.0
  assert Quartiles.of([3.0]) == Quartiles(3.0, 3.0, 3.0)


def test_routed_step_measures_every_variant(result):
  """The last line has the ratio that the bar is about, and every case."""
  found = result(
    "routed_step", "--dim=16", "--layers=1", "--heads=2", "--rows=1",
    "--length=32", "--modalities=3",
  )  # fmt: skip
  assert set(found["cases"]) == {"dense"} | {
    f"{name} K=3" for name in ("mot", "ffn", "ragged", "select")
  }
  ratio = found["cases"]["mot K=3"]["over_dense"]["median"]
  assert found["mot_over_dense"] == ratio
  # Routing adds no model FLOPs.
  assert len({case["model_flops"] for case in found["cases"].values()}) == 1
  assert found["environment"]["devices"]["kind"] == "cpu"


def test_attention_is_measured_by_implementation(result):
  """The gate's own and jax.nn's, with packed documents."""
  found = result("attention", "--shapes=1x48x2x8", "--documents=3")
  assert set(found["cases"]) == {
    f"{name} 1x48x2x8" for name in ("xla_blockwise", "reference", "jax.nn")
  }


def test_generation_is_measured_against_recomputing(result):
  found = result(
    "generation", "--shapes=2x192", "--dim=32", "--layers=1"
  )  # fmt: skip
  assert set(found["cases"]) == {"cached 2x192", "recomputed 2x192"}
  assert found["cases"]["cached 2x192"]["over_recomputed"]["median"] > 0


def test_train_step_compares_configs(result, tmp_path):
  """Each with its own overrides, on data through the loader."""
  file = tmp_path / "small.py"
  file.write_text(CONFIG)
  words = [f"--config={file}", f"--config={file} --config.model.untie=''"]
  found = result("train_step", "--compare", *words)
  assert list(found["cases"]) == words
  for case in found["cases"].values():
    assert case["tokens_per_s"] > 0
    assert 0 <= case["data_wait"] < 1
    assert case["compile_s"] > 0
  mot, dense = (found["cases"][word]["arguments_mib"] for word in words)
  assert mot > dense


@pytest.mark.parametrize(
  ("name", "words", "said"),
  [
    ("train_step", ["--compare", "--config=a.py"], "two or more"),
    ("train_step", ["--repeats=0"], "repeats"),
    ("routed_step", ["--variants=mot,fnf"], "did you mean 'ffn'?"),
    ("generation", ["--shapes=2x16"], "rows of 16 are too short"),
    ("attention", ["--shapes=2x3"], "'2x3' must be like 2x1024x8x64"),
  ],
)
def test_a_mistake_is_one_line(program, name, words, said):
  """As on the main command line."""
  done = program(name, *words)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ")
  assert said in line
