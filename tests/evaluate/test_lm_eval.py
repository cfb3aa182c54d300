"""The adapter of lm-eval: a task of our own, run by lm-eval itself."""

import json

import jax
import pytest

pytest.importorskip(
  "lm_eval", reason="lm-eval is not installed (pip install -e '.[lm-eval]')"
)

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from fusionlab.errors import UserError
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.evaluate.lm_eval import FusionlabLM
from fusionlab.generation.generate import Generated
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.tokenizers import load_tokenizers
from tests.train import fakes

QUESTIONS = [
  {"question": "The capital of Peru is", "choices": ["Lima", "Rome", "Oslo"]},
  {"question": "Two and two are", "choices": ["one", "four", "six"]},
  {"question": "Ice is frozen", "choices": ["water", "fire", "sand"]},
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """A tiny random model with towers, one id a byte."""
  folder = tmp_path_factory.mktemp("tokenizers")
  fakes.write_tokenizers(folder)
  tokenizers = load_tokenizers(
    str(folder / "text.json"), str(folder / "image.safetensors")
  )
  config = MixtureOfTransformersConfig(
    dim=16, num_layers=1, num_heads=2, ffn_dim=16
  )
  model = build_model(config, tokenizers.vocabulary)
  return model, jax.jit(model.init_params)(jax.random.key(0)), tokenizers


def evaluate(model, folder, **task):
  """Runs one task over `QUESTIONS`, read from local files alone."""
  rows = [{"answer": n % 3} | row for n, row in enumerate(QUESTIONS)]
  data = folder / "data.jsonl"
  data.write_text("\n".join(map(json.dumps, rows)))
  config = {
    "task": "ours",
    "dataset_path": "json",
    "dataset_kwargs": {
      "data_files": {"test": str(data)},
      "cache_dir": str(folder / "cache"),
    },
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
  } | task
  (folder / "ours.yaml").write_text(json.dumps(config))
  found = lm_eval.simple_evaluate(
    model=model,
    tasks=["ours"],
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    bootstrap_iters=0,
  )
  return found["results"]["ours"], found["samples"]["ours"]


def nats(loaded, prompt, continuation):
  """Scores a continuation without lm-eval."""
  model, params, tokenizers = loaded
  encode = tokenizers.text.encode
  ids = [tokenizers.vocabulary.bos, *encode(prompt)]
  return Scorer(model, params).score([ids], [encode(continuation)])


def test_multiple_choice(loaded, tmp_path):
  """The choice with the highest log p, as scored directly."""
  results, samples = evaluate(
    FusionlabLM(loaded=loaded),
    tmp_path,
    output_type="multiple_choice",
    doc_to_choice="choices",
    doc_to_target="answer",
    metric_list=[{"metric": "acc"}],
  )
  hits = []
  for row, sample in zip(QUESTIONS, samples, strict=True):
    scores = [
      nats(loaded, row["question"], f" {c}").log_probability[0]
      for c in row["choices"]
    ]
    shown = [float(r[0]) for r in sample["filtered_resps"]]
    assert shown == pytest.approx(scores, abs=1e-4)
    hits.append(max(range(3), key=scores.__getitem__))
  wanted = sum(h == n for n, h in enumerate(hits)) / 3
  assert results["acc,none"] == pytest.approx(wanted)


def test_rolling_bits_per_byte(loaded, tmp_path):
  """Whole texts after `<bos>`; windows where the text is longer."""
  task = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "bits_per_byte"}],
  }
  results, samples = evaluate(FusionlabLM(loaded=loaded), tmp_path, **task)
  for row, sample in zip(QUESTIONS, samples, strict=True):
    wanted = nats(loaded, "", row["question"]).log_probability[0]
    (shown,) = sample["filtered_resps"]
    assert shown == pytest.approx(wanted, abs=1e-3)
  assert 5 < results["bits_per_byte,none"] < 15


def test_long_texts_are_cut(loaded):
  """A window sees at most `max_length` ids, `<bos>` first."""
  model = FusionlabLM(loaded=loaded, max_length=9)
  text = "abcdefghijklmnopqrst"
  (rolled,) = model.loglikelihood_rolling(
    [Instance("loglikelihood_rolling", {}, (text,), 0)]
  )
  # Eight ids from <bos>, then as many from the one before them, then the rest.
  parts = [("", text[:8]), (text[7], text[8:16]), (text[11:16], text[16:])]
  wanted = sum(nats(loaded, *part).log_probability[0] for part in parts)
  assert rolled == pytest.approx(wanted, abs=1e-4)
  (cut,) = model.loglikelihood(
    [Instance("loglikelihood", {}, (text, "xyz"), 0)]
  )
  assert cut[0] == pytest.approx(
    nats(loaded, text[-5:], "xyz").log_probability[0], abs=1e-4
  )


def test_generation(loaded, tmp_path, monkeypatch):
  """Contexts, limit, stops and sampling reach `generate`; stops are cut off."""
  asked = []

  def generate(model, params, tokenizers, prompts, **options):
    assert (model, params, tokenizers) == loaded
    asked.append(
      ([tokenizers.text.decode(ids[1:]) for ids in prompts], options)
    )
    texts = [f" {row['choices'][0]}. And so on" for row in QUESTIONS]
    return [Generated(i, 0, (), (t,), "stop") for i, t in enumerate(texts)]

  monkeypatch.setattr("fusionlab.evaluate.lm_eval.generate", generate)
  task = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 7},
    "metric_list": [
      {"metric": "exact_match", "ignore_case": False},
    ],
    "filter_list": [
      {"name": "strip", "filter": [{"function": "remove_whitespace"}]}
    ],
  }
  results, _ = evaluate(FusionlabLM(loaded=loaded), tmp_path, **task)
  assert results["exact_match,strip"] == 1.0
  settings = {"make": "text", "max_new_tokens": 7, "stop": (".",)}
  greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
  questions = [r["question"] for r in QUESTIONS]
  assert asked == [(questions, settings | greedy)]
  sampled = task | {
    "generation_kwargs": {
      "until": ["."],
      "max_gen_toks": 7,
      "do_sample": True,
      "temperature": 0.5,
      "top_p": 0.9,
    }
  }
  evaluate(FusionlabLM(loaded=loaded), tmp_path, **sampled)
  drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 0}
  assert asked[1] == (questions, settings | drawn)


def test_generation_runs(loaded):
  """The real one, on a drawn model."""
  model = FusionlabLM(loaded=loaded)
  request = Instance(
    "generate_until", {}, ("abc", {"until": ["~"], "max_gen_toks": 5}), 0
  )
  (answer,) = model.generate_until([request])
  assert isinstance(answer, str)


def test_needs_one_checkpoint(loaded):
  with pytest.raises(UserError, match="either a path or a loaded"):
    FusionlabLM()
  with pytest.raises(UserError, match="either a path or a loaded"):
    FusionlabLM("runs/demo", loaded=loaded)
