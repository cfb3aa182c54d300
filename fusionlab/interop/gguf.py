"""GGUF files of llama.cpp: a Llama and its tokenizer in one file.

Quantised tensors become float32. llama.cpp rotates neighbouring features, so a
file holds the rows of q and k in that order; here they go back to halves.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.errors import UserError
from fusionlab.interop import llama_config
from fusionlab.interop.gguf_tokenizer import tokenizer_json
from fusionlab.interop.hugging_face import before_plain_text
from fusionlab.interop.llama import Llama
from fusionlab.interop.tables import (
  FROM_HEADS,
  SAME,
  TRANSPOSED,
  Conversion,
  Entry,
  Sizes,
  into_heads,
)

# Our key of a config.json -> metadata, without the architecture before it.
_KEYS = {
  "num_hidden_layers": "block_count",
  "hidden_size": "embedding_length",
  "intermediate_size": "feed_forward_length",
  "num_attention_heads": "attention.head_count",
  "rms_norm_eps": "attention.layer_norm_rms_epsilon",
  "max_position_embeddings": "context_length",
}
_OPTIONAL = {
  "num_key_value_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "rope_theta": "rope.freq_base",
}
_FREQUENCIES = "rope_freqs.weight"


def read(path: Path, *, with_tokenizer: bool = True) -> Llama:
  """Reads a file; tensors when they are asked for.

  Args:
    path: a GGUF file.
    with_tokenizer: whether its tokenizer is needed.

  Raises:
    ModuleNotFoundError: the package gguf is missing.
    UserError: a file that is truncated or malformed, another architecture, or a
      kind of tokenizer that is not known here.
  """
  import gguf

  try:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except Exception as error:  # whatever its parser meets in a broken file
    raise UserError(
      f"{path} is no whole GGUF file ({_said(error)}); get it again"
    ) from error
  tensors = _Tensors(path, {t.name: t for t in reader.tensors})
  if "token_embd.weight" not in tensors:
    raise UserError(f"{path}: tensor 'token_embd.weight' is missing")
  config, vocab_size, max_position, specials = llama_config.read_config(
    _as_config(fields, tensors, path), str(path)
  )
  tokens = fields.get("tokenizer.ggml.tokens", [])
  vocab = {piece: i for i, piece in enumerate(tokens)}
  if fields.get("tokenizer.ggml.add_bos_token") is False:
    specials = before_plain_text(specials, vocab)
  tokenizer = None
  if with_tokenizer:
    tokenizer = tokenizer_json(fields, path)
  return Llama(
    origin=str(path),
    config=config,
    vocab_size=vocab_size,
    max_position=max_position,
    specials=specials,
    tensors=tensors,
    table=table(tied=config.tie_embeddings),
    file_of=lambda name: str(path),
    tokenizer=tokenizer,
  )


def table(*, tied: bool) -> list[Entry]:
  """Names of a Llama's tensors in a GGUF file.

  Args:
    tied: whether the output table is the input table.
  """
  layer = [
    Entry("attn_norm.weight", "mixer_norm/{tower}/scale", ("d",), SAME),
    Entry(
      "attn_q.weight",
      "attention/{tower}/q",
      ("HD", "d"),
      _into_interleaved_heads("H"),
    ),
    Entry(
      "attn_k.weight",
      "attention/{tower}/k",
      ("GD", "d"),
      _into_interleaved_heads("G"),
    ),
    Entry("attn_v.weight", "attention/{tower}/v", ("GD", "d"), into_heads("G")),
    Entry("attn_output.weight", "attention/{tower}/o", ("d", "HD"), FROM_HEADS),
    Entry("ffn_norm.weight", "ffn_norm/{tower}/scale", ("d",), SAME),
    Entry("ffn_gate.weight", "ffn/{tower}/w_gate", ("F", "d"), TRANSPOSED),
    Entry("ffn_up.weight", "ffn/{tower}/w_in", ("F", "d"), TRANSPOSED),
    Entry("ffn_down.weight", "ffn/{tower}/w_out", ("d", "F"), TRANSPOSED),
  ]
  entries = [
    Entry("token_embd.weight", "embed", ("V", "d"), SAME),
    *(entry.below("blk.{l}.", "layers/") for entry in layer),
    Entry("output_norm.weight", "final_norm/{tower}/scale", ("d",), SAME),
  ]
  if not tied:
    entries.append(Entry("output.weight", "unembed", ("V", "d"), TRANSPOSED))
  return entries


def _into_interleaved_heads(heads: str) -> Conversion:
  """Rows (head, pair, half) there; (head, half, pair) here, then into heads."""
  halves = into_heads(heads)

  def swap(array: np.ndarray, sizes: Sizes, *inner: int) -> np.ndarray:
    split = array.reshape(sizes[heads], *inner, array.shape[-1])
    return split.swapaxes(1, 2).reshape(array.shape)

  def to_ours(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return halves.to_ours(swap(array, sizes, sizes["D"] // 2, 2), sizes)

  def to_theirs(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return swap(halves.to_theirs(array, sizes), sizes, 2, sizes["D"] // 2)

  return Conversion(to_ours, to_theirs)


class _Tensors(Mapping[str, np.ndarray]):
  """Tensors of a file by name, dequantised when they are asked for."""

  def __init__(self, path: Path, tensors: Mapping[str, Any]):
    self._path = path
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    import gguf

    tensor = self._tensors[name]
    try:
      array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
      # A file names the fastest dimension first.
      return np.asarray(array, np.float32).reshape(self.shape(name))
    except (NotImplementedError, ValueError) as error:
      raise UserError(
        f"{self._path}: tensor {name!r} of type {tensor.tensor_type.name} cannot"
        f" be read ({_said(error)})"
      ) from error

  def __iter__(self) -> Iterator[str]:
    return (name for name in self._tensors if name != _FREQUENCIES)

  def __len__(self) -> int:
    return sum(1 for _ in self)

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    """A tensor's shape, slowest dimension first."""
    return tuple(int(n) for n in reversed(self._tensors[name].shape))


def _as_config(
  fields: Mapping[str, Any], tensors: _Tensors, path: Path
) -> dict[str, Any]:
  """The config.json that the metadata stand for."""
  kind = fields.get("general.architecture")
  config: dict[str, Any] = {"model_type": kind}
  if kind != "llama":
    return config  # refused by the one who reads it
  for ours, theirs in {**_KEYS, **_OPTIONAL}.items():
    value = fields.get(f"{kind}.{theirs}")
    if value is None and ours in _KEYS:
      raise UserError(f"{path}: the metadata lack '{kind}.{theirs}'")
    if isinstance(value, float):
      value = float(str(np.float32(value)))  # 1e-05, not 9.99999974e-06
    config[ours] = value
  config["vocab_size"] = tensors.shape("token_embd.weight")[0]
  config["tie_word_embeddings"] = "output.weight" not in tensors
  for name, key in (
    ("bos", "bos_token_id"),
    ("eos", "eos_token_id"),
    ("pad", "padding_token_id"),
  ):
    config[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{key}")
  width = config["head_dim"] or (
    config["hidden_size"] // config["num_attention_heads"]
  )
  rotated = fields.get(f"{kind}.rope.dimension_count", width)
  if rotated != width:
    raise UserError(
      f"{path}: {kind}.rope.dimension_count={rotated} is not supported; only"
      f" {width}, the whole head"
    )
  config["rope_scaling"] = _scaling(fields, tensors, config, width, path)
  return config


def _scaling(
  fields: Mapping[str, Any],
  tensors: _Tensors,
  config: Mapping[str, Any],
  width: int,
  path: Path,
) -> dict[str, Any] | None:
  if _FREQUENCIES in tensors:
    return _llama3(tensors[_FREQUENCIES], config, width, path)
  linear = fields.get("llama.rope.scale_linear")
  if linear:
    return {"rope_type": "linear", "factor": linear}
  kind = fields.get("llama.rope.scaling.type", "none")
  if kind == "none":
    return None
  given: dict[str, Any] = {"rope_type": kind}
  for ours, theirs in (
    ("factor", "factor"),
    ("original_max_position_embeddings", "original_context_length"),
  ):
    if f"llama.rope.scaling.{theirs}" in fields:
      given[ours] = fields[f"llama.rope.scaling.{theirs}"]
  return given


def _llama3(
  divisors: np.ndarray, config: Mapping[str, Any], width: int, path: Path
) -> dict[str, Any]:
  """Llama 3.1's scaling, of which a file keeps each frequency's divisor.

  Only the settings that Llama 3.1 and later were published with are known.
  """
  factor = float(divisors.max())
  pair = np.arange(0, width, 2) / width
  turns = 8192 * (config["rope_theta"] or 10000.0) ** -pair / (2 * np.pi)
  kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
  expected = 1 / (kept + (1 - kept) / factor)
  if divisors.shape != expected.shape or not np.allclose(
    divisors, expected, rtol=1e-3
  ):
    raise UserError(
      f"{path}: tensor {_FREQUENCIES!r} holds another scaling of positions than"
      f" Llama 3.1's, which is not supported; import the Hugging Face folder"
    )
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }


def _said(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
