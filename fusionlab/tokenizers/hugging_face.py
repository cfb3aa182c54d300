"""Text tokenizers of other models: Hugging Face `tokenizer.json`, ids in place.

Such a tokenizer is kept in one JSON file of ours: {"format", "size", "specials",
"tokenizer"}, the last as it was given. What a model does with its ids does not
change: they stay where they are, and what our documents need besides is appended
behind them. Byte-level files (GPT-2, Llama 3, SmolLM2) and sentencepiece-like ones
(Llama 2, Mistral, T5) can be used.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, pre_tokenizers

from fusionlab.errors import UserError
from fusionlab.tokenizers import storage

FORMAT = "fusionlab.text_tokenizer.1"
TOKENIZER_FILE = "tokenizer.json"
_MODELS = ("BPE", "Unigram")
_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace")
_DECODERS += ("Sequence", "Strip")
# Files beside a tokenizer.json, and spellings, that say which ids end documents.
_BESIDE = ("config.json", "generation_config.json", "tokenizer_config.json")
_SPELLINGS = {
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
  "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}


@dataclasses.dataclass(frozen=True)
class Specials:
  """Ids that stand for no text.

  Attributes:
    pad, bos, eos: of documents; two of them may be the same id.
    boi, eoi: around a picture's codes; None where the text has no such ids yet.
  """

  pad: int = 0
  bos: int = 1
  eos: int = 2
  boi: int | None = 3
  eoi: int | None = 4

  @property
  def ids(self) -> set[int]:
    """All that there are."""
    return {i for i in dataclasses.astuple(self) if i is not None}


def specials(
  *, size: int, bos: int | None, eos: int | None, pad: int | None, name: str
) -> Specials:
  """The ids of documents, where a model may not have all of them.

  A model with one of `<bos>` and `<eos>` separates documents by that one, so it
  stands at both ends. Padding is never read, so that `<eos>` serves for it.

  Args:
    size: the model's number of ids.
    bos: its id before documents; None where it has none.
    eos: its id after documents, or None.
    pad: its id for padding, or None.
    name: where they came from, for messages.

  Raises:
    UserError: neither bos nor eos, or an id that is not in 0..size-1.
  """
  eos = bos if eos is None else eos
  bos = eos if bos is None else bos
  if bos is None or eos is None:
    raise UserError(
      f"text tokenizer: {name} has neither a bos nor an eos id, and documents"
      f" need one between them; name one in a config.json beside it"
      f' (e.g. "eos_token_id": 0)'
    )
  pad = eos if pad is None else pad
  for what, value in (("bos", bos), ("eos", eos), ("pad", pad)):
    if not 0 <= value < size:
      raise UserError(
        f"text tokenizer: {name} has {what}={value}, which is not one of its"
        f" ids (0..{size - 1})"
      )
  return Specials(pad, bos, eos, None, None)


def pack(tokenizer: Any, given: Specials, size: int) -> bytes:
  """The content of our file.

  Args:
    tokenizer: the JSON object of a `tokenizer.json`.
    given: see `Specials`; `boi` and `eoi` follow the model's ids.
    size: the model's number of ids.
  """
  entry = {
    "format": FORMAT,
    "size": size,
    "specials": dataclasses.asdict(given),
    "tokenizer": tokenizer,
  }
  return json.dumps(entry, ensure_ascii=False).encode()


def unpack(entry: Any, name: str) -> tuple["Foreign", Specials, int]:
  """Reads what `pack` made.

  Args:
    entry: its JSON object.
    name: where it came from, for messages.

  Returns:
    The tokenizer, its special ids and the model's number of ids.

  Raises:
    UserError: of another format, or not what `pack` writes.
  """
  if entry["format"] != FORMAT:
    raise UserError(
      f"text tokenizer: {name} has format {entry['format']!r}, this version"
      f" reads {FORMAT!r}"
    )
  try:
    given, size = Specials(**entry["specials"]), entry["size"]
    content = entry["tokenizer"]
    if not all(isinstance(i, int) for i in (size, *given.ids)):
      raise TypeError
  except (KeyError, TypeError):
    raise UserError(
      f"text tokenizer: {name} is not a whole file of format {FORMAT!r}; write"
      f" it again with TextTokenizer.save"
    ) from None
  specials(size=size, bos=given.bos, eos=given.eos, pad=given.pad, name=name)
  if (given.boi, given.eoi) not in ((None, None), (size, size + 1)):
    raise UserError(
      f"text tokenizer: {name} has boi={given.boi} and eoi={given.eoi}; they"
      f" follow its {size} ids"
    )
  return Foreign(content, given, size, name), given, size


class Foreign:
  """A tokenizer of the `tokenizers` library in which no special can be spelt.

  Attributes:
    tokenizer: the library's.
    has_text: bool [size], ids that stand for text.
  """

  def __init__(self, content: Any, given: Specials, size: int, name: str):
    """Reads a tokenizer and turns off all that adds or cuts ids.

    Args:
      content: the JSON object of a `tokenizer.json`; it is not changed.
      given: the ids of documents.
      size: the model's number of ids.
      name: where it came from, for messages.

    Raises:
      UserError: not a tokenizer, of a kind that cannot be used, or with more ids
        than the model.
    """
    self.tokenizer = _load(content, given, name)
    added = self.tokenizer.get_added_tokens_decoder()
    vocab = self.tokenizer.get_vocab()
    largest = max(vocab.values(), default=-1)
    if largest >= size:
      raise UserError(
        f"text tokenizer: {name} has ids up to {largest}, the model has {size}"
        f" (0..{size - 1}); a tokenizer and a model belong together"
      )
    silent = given.ids | {i for i, token in added.items() if token.special}
    self.has_text: Bool[np.ndarray, " size"] = np.zeros(size, bool)
    self.has_text[list(vocab.values())] = True
    self.has_text[[i for i in silent if i < size]] = False
    self._added = {i: token.content for i, token in added.items()}
    self._byte_level = "ByteLevel" in _kinds(content["decoder"])
    # What stands before ids that go on with a text: some decoders take the
    # space away with which a text begins.
    self._lead = [] if self._byte_level else self._encode_one("a")
    pieces = {i: piece for piece, i in vocab.items()}
    spelt = silent & pieces.keys() - _unknown(content["model"], vocab)
    self._spelling = {i: self._spelt(pieces[i]) for i in spelt}

  def encode_batch(self, texts: list[str], name: str = "") -> list[list[int]]:
    """Returns the ids of each text; what looks like a special is text.

    Raises:
      UserError: a text that the tokenizer has no ids for.
    """
    try:
      batch = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
      raise UserError(
        f"text tokenizer: it has no ids for a text ({_one_line(error)})"
      ) from None
    return [
      encoding.ids
      if self._spelling.keys().isdisjoint(encoding.ids)
      else [j for i in encoding.ids for j in self._spelling.get(i, (i,))]
      for encoding in batch
    ]

  def decode(self, ids: list[int], *, continues: bool) -> str:
    """Returns the text of ids that have one.

    Args:
      ids: see `has_text`.
      continues: they go on with a text, and do not begin one.
    """
    lead = self._lead if continues else []
    before = self.tokenizer.decode(lead, skip_special_tokens=False)
    whole = self.tokenizer.decode([*lead, *ids], skip_special_tokens=False)
    return whole[len(before) :]

  def byte_lengths(self) -> Int[np.ndarray, " size"]:
    """UTF-8 bytes each id stands for within a text, int32."""
    lengths = np.zeros(len(self.has_text), np.int32)
    pieces = {
      i: piece
      for piece, i in self.tokenizer.get_vocab().items()
      if self.has_text[i]
    }
    if self._byte_level:
      for i, piece in pieces.items():
        # A byte is a character there, but tokens that were added are plain.
        added = self._added.get(i)
        lengths[i] = len(piece) if added is None else len(added.encode())
      return lengths
    texts = self.tokenizer.decode_batch(
      [[*self._lead, i] for i in pieces], skip_special_tokens=False
    )
    before = len(self.decode(self._lead, continues=False).encode())
    for (i, piece), text in zip(pieces.items(), texts, strict=True):
      is_byte = len(piece) == 6 and piece.startswith("<0x")
      lengths[i] = 1 if is_byte else len(text.encode()) - before
    return lengths

  def _encode_one(self, text: str) -> list[int]:
    ids = self.tokenizer.encode(text, add_special_tokens=False).ids
    return [i for i in ids if self.has_text[i]]

  def _spelt(self, piece: str) -> list[int]:
    """The ids of a special's spelling, character by character.

    Unigram models, and BPE that takes whole words, find a special in a text even
    where the library does not look for specials.
    """
    if self._byte_level:
      split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
      piece = "".join(part for part, _ in split.pre_tokenize_str(piece))
    try:
      tokens = [t for c in piece for t in self.tokenizer.model.tokenize(c)]
    except Exception:  # no id for a character, nor for what is unknown
      return []
    return [t.id for t in tokens if self.has_text[t.id]]


def _unknown(model: Any, vocab: dict[str, int]) -> set[int]:
  """The id that stands for what the model has no ids for; bytes need none."""
  if model.get("byte_fallback"):
    return set()
  unknown = vocab.get(model.get("unk_token"), model.get("unk_id"))
  return set() if unknown is None else {unknown}


def _load(content: Any, given: Specials, name: str) -> Tokenizer:
  """The library's tokenizer without what adds, cuts or drops ids."""
  tokenizer = parse(content, name)
  model = content["model"]
  decoders = _kinds(content.get("decoder"))
  refused = [kind for kind in decoders if kind not in _DECODERS]
  if model["type"] not in _MODELS:
    _refuse(name, f"its model is {model['type']}", " or ".join(_MODELS))
  if not decoders or refused:
    kind = refused[0] if refused else "none"
    _refuse(name, f"its decoder is {kind}", ", ".join(_DECODERS))
  added = [
    token | {"special": token["special"] or token["id"] in given.ids}
    for token in content.get("added_tokens") or ()
  ]
  changed = {
    **content,
    "added_tokens": added,
    "post_processor": None,
    "truncation": None,
    "padding": None,
  }
  if model.get("dropout"):
    changed["model"] = model | {"dropout": None}
  tokenizer = parse(changed, name)
  tokenizer.encode_special_tokens = True
  return tokenizer


def parse(content: Any, name: str) -> Tokenizer:
  """The library's tokenizer of a JSON object.

  Raises:
    UserError: it is none.
  """
  try:
    return Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # the library raises bare Exception
    not_whole(name, error)


def not_whole(name: str, error: Exception) -> NoReturn:
  """Raises the UserError of what is no file of the library.

  Args:
    name: where it came from.
    error: what was found wrong.
  """
  raise UserError(
    f"text tokenizer: {name} is not a whole file of the tokenizers library"
    f" ({_one_line(error)}); make one with python -m fusionlab.tokenizers"
    f" train-text, or give a Hugging Face tokenizer.json"
  ) from None


def ids_beside(file: Path, content: Any) -> dict[str, int | None]:
  """What a Hugging Face folder says about a tokenizer: arguments of `pack`.

  config.json, generation_config.json and tokenizer_config.json are asked in this
  order, then the usual spellings. Of several eos ids the first is taken.

  Args:
    file: the `tokenizer.json`.
    content: its JSON object.

  Returns:
    "size", "bos", "eos" and "pad"; None where nothing is known.

  Raises:
    UserError: a file beside it that is not JSON.
  """
  tokenizer = parse(content, repr(str(file)))
  largest = max(tokenizer.get_vocab().values(), default=-1)
  found: dict[str, int | None] = dict.fromkeys(("bos", "eos", "pad"))
  size = largest + 1
  for entry in (_object(file.parent / name) for name in _BESIDE):
    if isinstance(given := entry.get("vocab_size"), int):
      size = max(size, given)
    for what, known in found.items():
      if known is None:
        found[what] = _first_id(
          entry.get(f"{what}_token_id"), entry.get(f"{what}_token"), tokenizer
        )
  for what, spellings in _SPELLINGS.items():
    ids = [i for i in map(tokenizer.token_to_id, spellings) if i is not None]
    if found[what] is None and ids:
      found[what] = ids[0]
  return {"size": size, **found}


def _first_id(index: Any, token: Any, tokenizer: Tokenizer) -> int | None:
  """The id that a config names by number, by several, or by its spelling."""
  if isinstance(index, list):
    index = next(iter(index), None)
  if isinstance(token, dict):
    token = token.get("content")
  if not isinstance(index, int) and isinstance(token, str):
    index = tokenizer.token_to_id(token)
  # Some configs say -1 for none.
  return index if isinstance(index, int) and index >= 0 else None


def _object(path: Path) -> dict[str, Any]:
  """A JSON object; an empty one where there is no file."""
  if not path.is_file():
    return {}
  try:
    entry = json.loads(storage.read(path, "text tokenizer"))
  except ValueError as error:
    raise UserError(
      f"text tokenizer: {str(path)!r} is not JSON ({_one_line(error)});"
      f" restore it, or remove it to do without"
    ) from None
  if not isinstance(entry, dict):
    raise UserError(
      f"text tokenizer: {str(path)!r} holds no JSON object; restore it, or"
      f" remove it to do without"
    )
  return entry


def _kinds(decoder: Any) -> list[str]:
  """Types of a decoder and of all its parts."""
  if not decoder:
    return []
  parts = decoder.get("decoders") or ()
  return [decoder["type"], *(k for part in parts for k in _kinds(part))]


def _refuse(name: str, fault: str, allowed: str) -> NoReturn:
  raise UserError(
    f"text tokenizer: {name} cannot be used: {fault} (allowed: {allowed})"
  )


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:120]
