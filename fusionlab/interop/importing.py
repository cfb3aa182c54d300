"""`import`: weights of another program become a checkpoint of ours."""

import dataclasses
from pathlib import Path

from fusionlab.config import to_mapping
from fusionlab.errors import UserError, nearest
from fusionlab.experiment import Experiment
from fusionlab.interop import gguf, hugging_face
from fusionlab.interop.llama import Llama, Specials
from fusionlab.tokenizers import TextTokenizer, make_tokenizers

_GGUF_MAGIC = b"GGUF"


def open_source(source: Path, *, with_tokenizer: bool = True) -> Llama:
  """Opens what can be imported, recognised by what is there.

  Args:
    source: a Hugging Face folder or a GGUF file.
    with_tokenizer: whether its tokenizer is needed.

  Raises:
    UserError: neither, or what the format's reader refuses.
  """
  if source.is_dir():
    return hugging_face.read(source)
  if not source.exists():
    raise UserError(
      f"{source} does not exist; give a Hugging Face folder or a GGUF file"
    )
  with source.open("rb") as file:
    magic = file.read(4)
  if magic != _GGUF_MAGIC:
    raise UserError(
      f"{source} is neither a Hugging Face folder (config.json, safetensors,"
      f" tokenizer.json) nor a GGUF file"
    )
  return gguf.read(source, with_tokenizer=with_tokenizer)


def tokenizer_of(
  model: Llama, given: Path | None, bos: str = "", eos: str = ""
) -> TextTokenizer:
  """The text tokenizer of a model, its ids in their places.

  Args:
    model: whose ids they are.
    given: a `tokenizer.json`, or a folder with one, in the place of its own.
    bos: piece or id that begins a document, in the place of what the model says.
    eos: piece or id that ends one.

  Raises:
    UserError: no tokenizer, one that cannot be used or has more ids than the
      model, an unknown piece.
  """
  content, name = model.tokenizer, model.origin
  if given is not None:
    path = given / hugging_face.TOKENIZER if given.is_dir() else given
    name = str(path)
    try:
      content = path.read_bytes()
    except OSError as error:
      raise UserError(f"--tokenizer {path}: {error.strerror}") from error
  if content is None:
    raise UserError(
      f"{model.origin} has no {hugging_face.TOKENIZER}; give --tokenizer FILE,"
      f" the one of the model"
    )

  def make(specials: Specials) -> TextTokenizer:
    ids = dataclasses.asdict(specials)
    return TextTokenizer.from_hugging_face(
      content, size=model.vocab_size, **ids, name=name
    )

  changed = {
    what: _id(content, piece, what)
    for what, piece in (("bos", bos), ("eos", eos))
    if piece
  }
  return make(dataclasses.replace(model.specials, **changed))


def experiment_of(model: Llama) -> Experiment:
  """The configuration that a checkpoint of this model records.

  Args:
    model: gives the sizes and the longest document.
  """
  # Nothing was trained here, but a configuration has a source.
  data = {
    "sources": {"none": {"kind": "jsonl"}},
    "image_tokenizer": "none",
    "row_length": max(model.max_position, 8),
  }
  return Experiment.from_mapping(
    {"model": to_mapping(model.config), "data": data}
  )


def import_model(
  source: Path,
  out: Path,
  *,
  tokenizer: Path | None = None,
  bos: str = "",
  eos: str = "",
) -> str:
  """Writes a folder that `fusionlab.load` and `--mode=generate` read.

  Args:
    source: a Hugging Face folder or a GGUF file.
    out: new or empty; whole or not there.
    tokenizer: a `tokenizer.json` in the place of the source's own.
    bos: see `tokenizer_of`.
    eos: see `tokenizer_of`.

  Returns:
    One line about what was read.

  Raises:
    UserError: `out` holds something, or whatever is wrong with the source.
  """
  from fusionlab.train.checkpoint import save_model

  refuse_full(out)
  model = open_source(source, with_tokenizer=tokenizer is None)
  text = tokenizer_of(model, tokenizer, bos, eos)
  params = model.params()
  save_model(out, experiment_of(model), params, make_tokenizers(text))
  c = model.config
  first, last = text.specials.bos, text.specials.eos
  return (
    f"{c.num_layers} layers of width {c.dim}, {c.num_heads} query and"
    f" {c.kv_heads} key-value heads of {c.width_of_head}, FFN {c.width_of_ffn},"
    f" {model.vocab_size} ids, rope base {c.rope_base:g}"
    f" ({c.rope_scaling.kind} scaling); documents begin with id {first} and end"
    f" with {last}"
  )


def refuse_full(out: Path) -> None:
  """Keeps what is in a folder.

  Raises:
    UserError: a file, or a folder that is not empty.
  """
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(
      f"{out} exists and is not empty; name a new folder, or empty it"
    )


def _id(content: bytes, piece: str, what: str) -> int:
  """The id of a piece, or the number that it is."""
  from tokenizers import Tokenizer

  if piece.isdecimal():
    return int(piece)
  try:
    vocab = Tokenizer.from_str(content.decode()).get_vocab()
  except Exception as error:  # the library raises bare Exception
    raise UserError(
      f"--{what} needs a whole tokenizer.json ({error})"
    ) from error
  if piece not in vocab:
    special = [p for p in vocab if p.startswith("<")]
    raise UserError(f"unknown --{what} {piece!r}{nearest(piece, special)}")
  return vocab[piece]
