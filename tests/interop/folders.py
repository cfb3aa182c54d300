"""Small Llamas as other programs keep them, written without the library."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from fusionlab.tokenizers import TextTokenizer

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
SIZES = {
  "vocab_size": 270,
  "hidden_size": 12,
  "intermediate_size": 10,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 4,
}
CONFIG = {
  "model_type": "llama",
  **SIZES,
  "hidden_act": "silu",
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
}


def tokenizer_json() -> bytes:
  """A byte-level BPE of 261 ids."""
  return TextTokenizer.train(["a"], 261).tokenizer_json()


def shapes(*, tied=False) -> dict[str, tuple[int, ...]]:
  """Published names and shapes of a model of `SIZES`."""
  d, f, v = 12, 10, 270
  found = {"model.embed_tokens.weight": (v, d)}
  for i in range(2):
    layer = f"model.layers.{i}."
    found |= {
      f"{layer}input_layernorm.weight": (d,),
      f"{layer}self_attn.q_proj.weight": (8, d),
      f"{layer}self_attn.k_proj.weight": (4, d),
      f"{layer}self_attn.v_proj.weight": (4, d),
      f"{layer}self_attn.o_proj.weight": (d, 8),
      f"{layer}post_attention_layernorm.weight": (d,),
      f"{layer}mlp.gate_proj.weight": (f, d),
      f"{layer}mlp.up_proj.weight": (f, d),
      f"{layer}mlp.down_proj.weight": (d, f),
    }
  found["model.norm.weight"] = (d,)
  return found if tied else found | {"lm_head.weight": (v, d)}


def random_tensors(*, tied=False) -> dict[str, np.ndarray]:
  """Tensors of `shapes`, float32."""
  rng = np.random.default_rng(0)
  return {
    name: (rng.normal(size=shape) * 0.3 + ("norm" in name)).astype(np.float32)
    for name, shape in shapes(tied=tied).items()
  }


def write(folder, *, tensors=None, tokenizer=True, **changes) -> pathlib.Path:
  """A folder of `CONFIG` with changes; a change to None removes the key."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
  (folder / "config.json").write_text(json.dumps(config))
  if tensors is None:
    tensors = random_tensors(tied=bool(changes.get("tie_word_embeddings")))
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  if tokenizer:
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
  return folder
