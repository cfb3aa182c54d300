"""Hugging Face folders of a Llama: config.json, safetensors, tokenizer.json."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusionlab.errors import UserError
from fusionlab.interop import llama, llama_config, tensors
from fusionlab.interop.llama import Llama, Specials

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Kept by old versions; the config says the same.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_INPUT, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def read(folder: Path) -> Llama:
  """Reads a folder; tensors when they are asked for.

  Args:
    folder: with config.json and model.safetensors, or shards and their index.

  Raises:
    UserError: no such folder, or what `llama_config.read_config` and `tensors` refuse.
  """
  path = folder / CONFIG
  if not path.exists():
    raise UserError(f"{folder} has no {CONFIG}; give a Hugging Face folder")
  config, vocab_size, max_position, specials = llama_config.read_config(
    tensors.read_json(path), str(path)
  )
  found = tensors.open_folder(folder)
  found.without([name for name in found if _DERIVED.fullmatch(name)])
  if config.tie_embeddings and _OUTPUT in found:
    _check_tied(found)
    found.without([_OUTPUT])
  tokenizer = folder / TOKENIZER
  return Llama(
    origin=str(folder),
    config=config,
    vocab_size=vocab_size,
    max_position=max_position,
    specials=_first_id(folder, tokenizer, specials),
    tensors=found,
    table=llama.table(tied=config.tie_embeddings),
    file_of=found.file_of,
    tokenizer=tokenizer.read_bytes() if tokenizer.exists() else None,
  )


def write(
  folder: Path,
  config: dict[str, Any],
  weights: Iterable[tuple[str, np.ndarray]],
  *,
  tokenizer: bytes,
) -> int:
  """Writes a folder that `read` and Hugging Face's loaders read.

  Args:
    folder: an existing, empty folder.
    config: of `llama_config.write_config`.
    weights: by published name.
    tokenizer: content of its tokenizer.json.

  Returns:
    Bytes of all tensors.
  """
  total = tensors.write(folder, weights, dtype=config["dtype"])
  _write_json(folder / CONFIG, config)
  ids = {
    name: config[f"{name}_token_id"]
    for name in ("bos", "eos", "pad")
    if config[f"{name}_token_id"] is not None
  }
  _write_json(
    folder / "generation_config.json",
    {f"{name}_token_id": i for name, i in ids.items()},
  )
  (folder / TOKENIZER).write_bytes(tokenizer)
  piece = Tokenizer.from_str(tokenizer.decode()).id_to_token
  _write_json(
    folder / _TOKENIZER_CONFIG,
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_max_length": config["max_position_embeddings"],
      "clean_up_tokenization_spaces": False,
      **{
        f"{name}_token": piece(i)
        for name, i in ids.items()
        if piece(i) is not None
      },
    },
  )
  return total


def _check_tied(found: tensors.Tensors) -> None:
  """A tied model that keeps its output table must mean the input table."""
  if _INPUT not in found or np.array_equal(
    found[_INPUT], found[_OUTPUT], equal_nan=True
  ):
    return
  raise UserError(
    f"{found.file_of(_OUTPUT)}: tensor {_OUTPUT!r} differs from {_INPUT!r}, but"
    f" {CONFIG} says tie_word_embeddings=true; one of them is wrong"
  )


def _first_id(folder: Path, tokenizer: Path, specials: Specials) -> Specials:
  """The ids of documents, of which the first is what prompts begin with.

  A model whose tokenizer adds no bos (`add_bos_token` false) never saw its bos
  before plain text: where the tokenizer has GPT-2's separator of documents, plain
  text followed that one.
  """
  beside = folder / _TOKENIZER_CONFIG
  if not (beside.exists() and tokenizer.exists()):
    return specials
  adds = tensors.read_json(beside).get("add_bos_token")
  if adds is not False:
    return specials
  model = tensors.read_json(tokenizer).get("model")
  vocab = model.get("vocab") if isinstance(model, dict) else None
  return before_plain_text(specials, vocab if isinstance(vocab, dict) else {})


def before_plain_text(specials: Specials, vocab: dict[str, int]) -> Specials:
  """The ids of a model that was not trained with its bos before plain text.

  Args:
    specials: as its files say.
    vocab: id of each piece.

  Returns:
    Those, beginning with GPT-2's separator of documents where there is one, else
    with eos, which separates them then.
  """
  first = vocab.get("<|endoftext|>", specials.eos)
  bos = specials.bos if first is None else first
  return Specials(bos, specials.eos, specials.pad)


def _write_json(path: Path, content: Any) -> None:
  text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
  path.write_text(text, encoding="utf-8")
