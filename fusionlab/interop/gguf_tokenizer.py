"""The byte-level BPE inside of a GGUF file, as a `tokenizer.json`.

A file names its way of splitting text (`tokenizer.ggml.pre`); the patterns are
those of the models that are named so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.errors import UserError

# Pre-tokenizers by name: digits one by one, GPT-2's, Llama 3's.
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def tokenizer_json(fields: Mapping[str, Any], path: Path) -> bytes:
  """The content of a `tokenizer.json`, of what a GGUF file's metadata hold.

  Args:
    fields: the metadata.
    path: the file, for messages.

  Raises:
    UserError: not byte-level BPE, a pre-tokenizer that is not known here, or
      lists that are malformed.
  """
  kind = fields.get("tokenizer.ggml.model")
  if kind != "gpt2":
    raise UserError(
      f"{path}: tokenizer.ggml.model={kind!r} is not supported; only 'gpt2'"
      f" (byte-level BPE): give --tokenizer the model's tokenizer.json"
    )
  name = fields.get("tokenizer.ggml.pre", "gpt-2")
  split = _pre_tokenizers(name)
  if split is None:
    known = ", ".join((*_DIGITS, *_GPT2, *_LLAMA3))
    raise UserError(
      f"{path}: tokenizer.ggml.pre={name!r} is not supported; only {known}: give"
      f" --tokenizer the model's tokenizer.json"
    )
  tokens = fields.get("tokenizer.ggml.tokens", [])
  vocab = {piece: i for i, piece in enumerate(tokens)}
  merges = [m.split(" ") for m in fields.get("tokenizer.ggml.merges", [])]
  types = fields.get("tokenizer.ggml.token_type", [])
  if (
    not vocab
    or len(vocab) < len(tokens)
    or any(len(pair) != 2 for pair in merges)
  ):
    raise UserError(f"{path}: tokenizer.ggml.tokens or .merges are malformed")
  added = [
    {
      "id": i,
      "content": piece,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": kind == _CONTROL,
    }
    for (piece, i), kind in zip(vocab.items(), types, strict=False)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  content = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
    "post_processor": None,
    "decoder": _byte_level(use_regex=True),
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": name in _LLAMA3,
      "vocab": vocab,
      "merges": merges,
    },
  }
  return json.dumps(content).encode()


def _pre_tokenizers(name: str) -> list[dict[str, Any]] | None:
  if name in _DIGITS:
    digits = {"type": "Digits", "individual_digits": True}
    return [digits, _byte_level(use_regex=True)]
  if name in _GPT2:
    return [_byte_level(use_regex=True)]
  if name in _LLAMA3:
    split = {
      "type": "Split",
      "pattern": {"Regex": _LLAMA3_SPLIT},
      "behavior": "Isolated",
      "invert": False,
    }
    return [split, _byte_level(use_regex=False)]
  return None


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": use_regex,
  }
