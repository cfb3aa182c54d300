"""One tower of a Mixture-of-Transformers is a Llama on text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fusionlab.batch import batch_of_ids
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.interop import hugging_face
from fusionlab.interop.__main__ import main
from fusionlab.interop.exporting import export_model
from fusionlab.interop.importing import import_model
from fusionlab.models import build_model
from fusionlab.tokenizers import ImageTokenizer, TextTokenizer, make_tokenizers
from fusionlab.train.checkpoint import load, save_model
from tests.interop import folders
from tests.train.fakes import tokenizer_files


def tokenizers_of(text=None):
  ours, image = tokenizer_files()
  text = text or TextTokenizer(ours)
  return make_tokenizers(text, ImageTokenizer(image))


def write_run(folder, *, text=None, **changes):
  """A checkpoint of text and pictures with weights that are all drawn."""
  tokenizers = tokenizers_of(text)
  settings = {
    "kind": "mixture_of_transformers",
    "dim": 12,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "ffn_dim": 10,
    "norm_placement": "pre",
    "qk_norm": "none",
  } | changes
  data = {"sources": {"none": {"kind": "jsonl"}}, "row_length": 32}
  experiment = Experiment.from_mapping({"model": settings, "data": data})
  model = build_model(experiment.model, tokenizers.vocabulary, 32)
  shapes = model.abstract_params()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.3, shapes
  )
  save_model(folder, experiment, params, tokenizers)
  return model, params, tokenizers


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"tie_embeddings": True, "untie": "ffn ffn_norm q"},
    {"untie": ""},
  ],
  ids=["all", "some", "dense"],
)
def test_the_text_tower_gives_the_models_logits_on_text(tmp_path, changes):
  model, params, tokenizers = write_run(tmp_path / "run", **changes)
  export_model(tmp_path / "run", tmp_path / "out", tower="text")
  exported = hugging_face.read(tmp_path / "out")
  size = tokenizers.text.base_size
  assert exported.vocab_size == size == 261
  alone = build_model(
    exported.config, make_tokenizers(tokenizers.text).vocabulary
  )

  def logits(model, params):
    towers = model.config.routed_towers.of_modality
    ids = [1, *tokenizers.text.encode("some text"), 2]
    batch = batch_of_ids([ids], model.vocabulary, towers=towers)
    params = jax.tree.map(jnp.asarray, params)
    hidden = jax.jit(lambda p: model.apply({"params": p}, batch))(params)
    return np.asarray(model.logits(params, hidden))

  np.testing.assert_allclose(
    logits(alone, exported.params()),
    logits(model, params)[..., :size],
    rtol=1e-5,
    atol=1e-5,
  )


def test_specials_that_were_appended_are_not_exported(tmp_path):
  """A Llama in, grown by pictures, a Llama out: its rows, in its order."""
  import_model(folders.write(tmp_path / "in"), tmp_path / "llama")
  text = load(tmp_path / "llama").tokenizers.text
  _, params, tokenizers = write_run(tmp_path / "run", text=text)
  assert tokenizers.text.vocab_size == tokenizers.text.base_size + 2
  export_model(tmp_path / "run", tmp_path / "out", tower="text")
  found = load_file(tmp_path / "out" / "model.safetensors")
  name = "model.embed_tokens.weight"
  np.testing.assert_array_equal(found[name], params["embed"][:270])
  np.testing.assert_array_equal(
    found["lm_head.weight"], params["unembed"][:, :270].T
  )
  written = (tmp_path / "out" / "tokenizer.json").read_bytes()
  again = TextTokenizer.from_hugging_face(written, size=270, bos=1, eos=2)
  assert again.hash == text.hash


def test_towers_are_chosen_by_name(tmp_path, capsys):
  write_run(tmp_path / "run")
  for tower, said in (("", "the towers text, image"), ("txt", "'text'")):
    with pytest.raises(UserError, match=said):
      export_model(tmp_path / "run", tmp_path / "out", tower=tower)
  words = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
  assert main([*words, "--tower", "image"]) == 0
  assert "the tower 'image' of step 0: 261 ids" in capsys.readouterr().out


@pytest.mark.parametrize(
  "changes", [{"qk_norm": "rms"}, {"norm_placement": "swin"}]
)
def test_what_a_llama_cannot_hold_leaves_nothing(tmp_path, capsys, changes):
  write_run(tmp_path / "run", **changes)
  words = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
  assert main([*words, "--tower", "text"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  ((key, value),) = changes.items()
  assert f"config.model.{key}={value!r}" in line
  assert {p.name for p in tmp_path.iterdir()} == {"run"}
