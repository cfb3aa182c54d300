"""Folders in and out: bit-equal, whole or not there, one line where refused."""

import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import fusionlab
from fusionlab.interop.__main__ import main
from fusionlab.interop.importing import import_model
from fusionlab.train.checkpoint import load
from tests.interop import folders


def same(a, b):
  return a.keys() == b.keys() and all(
    a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
  )


@pytest.mark.parametrize("tied", [False, True])
def test_in_and_out_changes_no_bit(tmp_path, tied, capsys):
  tensors = folders.random_tensors(tied=tied)
  tensors["model.norm.weight"][3] = np.nan
  source = folders.write(
    tmp_path / "in", tensors=tensors, tie_word_embeddings=tied
  )
  assert main(["import", str(source), str(tmp_path / "run")]) == 0
  assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
  assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
  said = capsys.readouterr().out
  assert f"written: {tmp_path / 'out'}" in said
  assert "documents begin with id 1 and end with 2" in said
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  for key, value in folders.CONFIG.items():
    if key != "tie_word_embeddings":
      assert config[key] == value
  assert config["tie_word_embeddings"] is tied
  assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "run"}
  # And again: a checkpoint of what was exported is the checkpoint.
  import_model(tmp_path / "out", tmp_path / "again")
  before, after = load(tmp_path / "run"), load(tmp_path / "again")
  assert before.experiment == after.experiment
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
  assert before.tokenizers.hash == after.tokenizers.hash


def test_bfloat16_out_is_the_nearest(tmp_path):
  source = folders.write(tmp_path / "in")
  import_model(source, tmp_path / "run")
  out = tmp_path / "out"
  assert (
    main(["export", str(tmp_path / "run"), str(out), "--dtype", "bfloat16"])
    == 0
  )
  found = load_file(out / "model.safetensors")
  for name, array in folders.random_tensors().items():
    assert found[name].dtype == "bfloat16"
    np.testing.assert_array_equal(found[name], array.astype(found[name].dtype))
  # What has only bfloat16's bits comes back whole.
  import_model(out, tmp_path / "run2")
  main(["export", str(tmp_path / "run2"), str(tmp_path / "out2"), "--dtype",
        "bfloat16"])  # fmt: skip
  assert same(load_file(tmp_path / "out2" / "model.safetensors"), found)


def test_an_import_is_a_model_that_generates(tmp_path):
  import_model(folders.write(tmp_path / "in"), tmp_path / "run")
  model, params, tokenizers = fusionlab.load(tmp_path / "run")
  assert model.row_length == 64
  assert tokenizers.vocabulary.modalities == ("text",)
  assert tokenizers.vocabulary.size == 270
  (result,) = fusionlab.generate(
    model, params, tokenizers, "ab", make="text", max_new_tokens=2
  )
  assert result.ids[0] == 1


def test_a_train_run_is_told_where_imported_weights_are_used(tmp_path):
  from fusionlab.train.workdir import recorded

  import_model(folders.write(tmp_path / "in"), tmp_path / "run")
  with pytest.raises(fusionlab.UserError, match=r"--config\.init\.checkpoint="):
    recorded(tmp_path / "run")


def test_tables_that_old_versions_kept_are_left_out(tmp_path):
  tensors = folders.random_tensors(tied=True)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, "f4")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  source = folders.write(
    tmp_path / "in", tensors=tensors, tie_word_embeddings=True
  )
  import_model(source, tmp_path / "run")
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  source = folders.write(
    tmp_path / "in2", tensors=tensors, tie_word_embeddings=True
  )
  with pytest.raises(fusionlab.UserError, match=r"differs from 'model\.embed"):
    import_model(source, tmp_path / "run2")


def test_a_model_that_adds_no_bos_begins_with_the_separator(tmp_path):
  source = folders.write(tmp_path / "in")
  (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
  import_model(source, tmp_path / "run")
  specials = load(tmp_path / "run").tokenizers.text.specials
  assert (specials.bos, specials.eos) == (2, 2)
  import_model(source, tmp_path / "run2", bos="<pad>", eos="4")
  specials = load(tmp_path / "run2").tokenizers.text.specials
  assert (specials.bos, specials.eos) == (0, 4)


def _without(name):
  tensors = folders.random_tensors()
  del tensors[name]
  return tensors


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"tensors": _without("model.layers.1.mlp.up_proj.weight")},
      "1 tensor(s) missing, first 'model.layers.1.mlp.up_proj.weight'",
    ),
    ({"tensors": _without("lm_head.weight")}, "first 'lm_head.weight'"),
    (
      {"num_hidden_layers": 1},
      "unknown tensor 'model.layers.1.input_layernorm.weight', did you mean",
    ),
    ({"intermediate_size": 11}, "it must be [11, 12] (F x d)"),
    (
      {"tie_word_embeddings": True, "tensors": folders.random_tensors()},
      "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'",
    ),
    ({"vocab_size": 271}, "has shape [270, 12]; it must be [271, 12]"),
    ({"tokenizer": False}, "has no tokenizer.json; give --tokenizer FILE"),
    ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
    ({"bos_token_id": 999}, "999"),
  ],
)
def test_a_folder_that_does_not_fit_is_one_line(
  tmp_path, capsys, settings, said
):
  source = folders.write(tmp_path / "in", **settings)
  assert main(["import", str(source), str(tmp_path / "run")]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
  assert str(source) in line
  assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_a_tokenizer_of_another_model_is_one_line(tmp_path, capsys):
  tensors = folders.random_tensors()
  for name in ("lm_head.weight", "model.embed_tokens.weight"):
    tensors[name] = tensors[name][:100]
  source = folders.write(tmp_path / "in", tensors=tensors, vocab_size=100)
  assert main(["import", str(source), str(tmp_path / "run")]) == 2
  assert "ids up to 260, the model has 100" in capsys.readouterr().err


@pytest.mark.parametrize(
  "words",
  [
    ["import", "{tmp}/nowhere", "{tmp}/run"],
    ["import", "{tmp}/text", "{tmp}/run"],
    ["import", "{tmp}/full", "{tmp}/run"],
    ["import", "{tmp}/in", "{tmp}/full"],
    ["import", "{tmp}/in", "{tmp}/text"],
    ["import", "{tmp}/in", "{tmp}/text/run"],
    ["import", "{tmp}/in", "{tmp}/run", "--tokenizer", "{tmp}/nowhere"],
    ["import", "{tmp}/in", "{tmp}/run", "--tokenizer", "{tmp}/text"],
    ["import", "{tmp}/in", "{tmp}/run", "--bos", "<bo>"],
    ["export", "{tmp}/nowhere", "{tmp}/out"],
    ["export", "{tmp}/in", "{tmp}/full"],
    ["check", "{tmp}/nowhere", "--reference", "{tmp}/text"],
  ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(
  tmp_path, capsys, words
):
  folders.write(tmp_path / "in")
  (tmp_path / "text").write_text("hello")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").write_text("kept")
  assert main([word.format(tmp=tmp_path) for word in words]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
  assert {p.name for p in tmp_path.iterdir()} == {"in", "text", "full"}
  assert (tmp_path / "full" / "mine").read_text() == "kept"


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  (tmp_path / "m.gguf").write_bytes(b"GGUF")
  assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "run")]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "pip install -e '.[gguf]'" in line
