"""A GGUF file is the Hugging Face folder that it was made of."""

import numpy as np
import pytest

import fusionlab
from fusionlab.interop.__main__ import main
from fusionlab.interop.importing import import_model
from fusionlab.train.checkpoint import load
from tests.interop import folders

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

NAMES = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
# The alphabet of byte-level BPE as its first ids, after what is special.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def names_there(name):
  whole = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }
  if name in whole:
    return whole[name]
  _, _, layer, rest = name.split(".", 3)
  return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(array, heads):
  """Rows of a head: x0 y0 x1 y1 … instead of x0 x1 … y0 y1 …."""
  width = len(array) // heads
  out = np.empty_like(array)
  for h in range(heads):
    rows = array[h * width : (h + 1) * width]
    out[h * width : (h + 1) * width : 2] = rows[: width // 2]
    out[h * width + 1 : (h + 1) * width : 2] = rows[width // 2 :]
  return out


def pieces():
  from tokenizers.pre_tokenizers import ByteLevel

  words = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "Ġt"]
  return words + [f"unused{i}" for i in range(270 - len(words))]


def write(
  path, *, tied=False, tensors=None, pre="smollm", kind="llama", **more
):
  writer = gguf.GGUFWriter(path, kind)
  writer.add_context_length(64)
  writer.add_embedding_length(12)
  writer.add_block_count(2)
  writer.add_feed_forward_length(10)
  writer.add_head_count(2)
  writer.add_head_count_kv(1)
  writer.add_key_length(4)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(10000.0)
  writer.add_rope_dimension_count(more.get("rotated", 4))
  if "linear" in more:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(more["linear"])
  writer.add_tokenizer_model(more.get("model", "gpt2"))
  writer.add_tokenizer_pre(pre)
  tokens = pieces()
  writer.add_token_list(tokens)
  writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
  writer.add_token_merges(more.get("merges", ["h e", "Ġ t"]))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_bos_token(False)
  for name, array in (tensors or folders.random_tensors(tied=tied)).items():
    if "q_proj" in name or "k_proj" in name:
      array = interleaved(array, 2 if "q_proj" in name else 1)
    there = name if name == "rope_freqs.weight" else names_there(name)
    writer.add_tensor(there, np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("tied", [False, True])
def test_its_weights_are_the_folders(tmp_path, tied):
  write(tmp_path / "m.gguf", tied=tied)
  import_model(tmp_path / "m.gguf", tmp_path / "run")
  source = folders.write(tmp_path / "in", tie_word_embeddings=tied)
  import_model(source, tmp_path / "same")
  found, expected = load(tmp_path / "run"), load(tmp_path / "same")
  assert found.experiment == expected.experiment

  def equal(a, b):
    if isinstance(a, dict):
      assert a.keys() == b.keys()
      for key in a:
        equal(a[key], b[key])
    else:
      np.testing.assert_array_equal(a, b)

  equal(found.params, expected.params)


def test_its_tokenizer_is_byte_level_with_digits_apart(tmp_path):
  write(tmp_path / "m.gguf")
  import_model(tmp_path / "m.gguf", tmp_path / "run")
  text = load(tmp_path / "run").tokenizers.text
  tokens = pieces()
  for given, split in (
    ("he the", ["he", "Ġt", "he"]),
    ("12", ["1", "2"]),
    ("é", ["Ã", "©"]),
  ):
    ids = text.encode(given)
    assert [tokens[i] for i in ids] == split
    assert text.decode(ids) == given
  # Plain text followed the separator of documents, a chat's end is its own.
  assert (text.specials.bos, text.specials.eos) == (0, 2)
  assert text.base_size == text.vocab_size == 270


@pytest.mark.parametrize(
  ("pre", "split"),
  [("gpt-2", ["1", "2"]), ("llama-bpe", ["1", "2"])],
)
def test_other_ways_to_split(tmp_path, pre, split):
  write(tmp_path / "m.gguf", pre=pre)
  import_model(tmp_path / "m.gguf", tmp_path / "run")
  text = load(tmp_path / "run").tokenizers.text
  assert [pieces()[i] for i in text.encode("12")] == split
  assert (
    text.decode(text.encode("don't, 1234 …\n\n x")) == "don't, 1234 …\n\n x"
  )


def llama3_divisors(factor=8.0, change=1.0):
  turns = 8192 * 10000.0 ** (-np.arange(0, 4, 2) / 4) / (2 * np.pi)
  kept = np.clip((turns - 1) / 3, 0, 1)
  return (change / (kept + (1 - kept) / factor)).astype(np.float32)


def test_scalings_of_positions(tmp_path):
  write(tmp_path / "linear.gguf", linear=4.0)
  import_model(tmp_path / "linear.gguf", tmp_path / "linear")
  scaling = load(tmp_path / "linear").experiment.model.rope_scaling
  assert (scaling.kind, scaling.factor) == ("linear", 4.0)
  # The slowest of so few frequencies makes 13 turns: nothing is divided.
  tensors = folders.random_tensors()
  tensors["rope_freqs.weight"] = llama3_divisors()
  write(tmp_path / "llama3.gguf", tensors=tensors)
  import_model(tmp_path / "llama3.gguf", tmp_path / "llama3")
  scaling = load(tmp_path / "llama3").experiment.model.rope_scaling
  assert (scaling.kind, scaling.original_max_position) == ("llama3", 8192)


def _other_frequencies():
  divisors = {"rope_freqs.weight": np.array([1.0, 3.0], np.float32)}
  return folders.random_tensors() | divisors


def _without(name):
  return {k: v for k, v in folders.random_tensors().items() if k != name}


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"kind": "qwen2"}, "model_type='qwen2' is not supported; only 'llama'"),
    ({"pre": "qwen35"}, "tokenizer.ggml.pre='qwen35' is not supported; only"),
    ({"model": "llama"}, "tokenizer.ggml.model='llama' is not supported"),
    ({"merges": ["a b c"]}, "tokenizer.ggml.tokens or .merges are malformed"),
    ({"rotated": 2}, "llama.rope.dimension_count=2 is not supported; only 4"),
    ({"tensors": _other_frequencies()}, "holds another scaling of positions"),
    (
      {"tensors": _without("model.layers.1.mlp.up_proj.weight")},
      "1 tensor(s) missing, first 'blk.1.ffn_up.weight'",
    ),
    (
      {"tensors": _without("model.embed_tokens.weight")},
      "tensor 'token_embd.weight' is missing",
    ),
  ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, settings, said):
  write(tmp_path / "m.gguf", **settings)
  assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "run")]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
  assert "m.gguf" in line
  assert not (tmp_path / "run").exists()


def test_a_truncated_file_is_one_line(tmp_path):
  path = write(tmp_path / "m.gguf")
  whole = path.read_bytes()
  for end in (4, 10, 300, len(whole) // 2, len(whole) - 40):
    path.write_bytes(whole[:end])
    with pytest.raises(fusionlab.UserError, match="no whole GGUF file"):
      import_model(path, tmp_path / "run")


def test_a_given_tokenizer_takes_the_place_of_its_own(tmp_path):
  write(tmp_path / "m.gguf", model="llama")
  (tmp_path / "t.json").write_bytes(folders.tokenizer_json())
  import_model(
    tmp_path / "m.gguf", tmp_path / "run", tokenizer=tmp_path / "t.json"
  )
  text = load(tmp_path / "run").tokenizers.text
  assert text.decode(text.encode("abc")) == "abc"
