"""A run of text only, end to end: another library's tokenizer to a report."""

import json

import pytest

from experiments import run as command
from experiments.command_line import Options
from fusionlab.evaluate import scoring
from fusionlab.experiment import Experiment
from fusionlab.generation.config import Request
from fusionlab.train.checkpoint import load_model
from tests.tokenizers import foreign


def experiment_of(folder, **data):
  lines = [{"text": f"the red apple no {n}"} for n in range(60)]
  (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
  (folder / "tokenizer.json").write_bytes(foreign.byte_level())
  (folder / "config.json").write_text('{"eos_token_id": 0, "vocab_size": 290}')
  return Experiment.from_mapping(
    {
      "model": {
        "kind": "transformer",
        "modalities": ("text",),
        "towers": (0,),
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 16,
      },
      "objective": {"kind": "next_token"},
      "data": {
        "sources": {
          "mine": {
            "kind": "jsonl",
            "path": str(folder / "texts.jsonl"),
            "heldout": 0.4,
          }
        },
        "cache_dir": str(folder / "cache"),
        "text_tokenizer": str(folder),
        "image_tokenizer": "none",
        "row_length": 64,
        **data,
      },
      "train": {"batch_size": 2, "num_steps": 2, "writers": "csv"},
    }
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  options = Options("train", str(folder / "run"), experiment_of(folder))
  assert command.run(options) == 0
  return folder / "run"


def test_a_finished_run_is_scored_and_reported(workdir):
  metrics = json.loads((workdir / "evaluation.json").read_text())["metrics"]
  assert metrics["eval/bits_per_byte/text"] > 0
  assert not [name for name in metrics if "image" in name or "picture" in name]
  page = (workdir / "report.html").read_text()
  assert "Held-out scores" in page and "Pictures" not in page


def test_it_is_scored_again_from_its_checkpoint_alone(workdir):
  before = json.loads((workdir / "evaluation.json").read_text())["metrics"]
  again = scoring.run(str(workdir))["metrics"]
  assert again["eval/loss/text"] == pytest.approx(before["eval/loss/text"])


def test_its_checkpoint_has_its_vocabulary(workdir):
  model, _, tokenizers = load_model(workdir)
  assert tokenizers.image is None and model.vocabulary.size == 290
  assert tokenizers.vocabulary.specials == (0,)


def test_it_writes_texts(workdir, capsys):
  request = Request(prompts=("the red",), settings={"max_new_tokens": 4})
  options = Options("generate", str(workdir), None, request)
  assert command.run(options) == 0
  assert "the red →" in capsys.readouterr().out
  (made,) = (workdir / "generated").iterdir()
  assert {p.name for p in made.iterdir()} == {"generated.json", "generated.txt"}
