"""Text ids: byte-level byte-pair encoding that loses no byte.

Ids 0..4 are the specials of the shared vocabulary. They are entries of the
vocabulary but not "added tokens", so their spelling in a text is text: the
encoder cannot be talked into an end of document. Tokenizers of other models keep
their own ids, see `hugging_face`.
Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford
et al. 2019 (GPT-2), §2.2.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusionlab.errors import UserError
from fusionlab.tokenizers import hugging_face, storage
from fusionlab.tokenizers.hugging_face import Foreign, Specials

SPECIALS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>")
SMALLEST = len(SPECIALS) + 256


class TextTokenizer:
  """Turns text into ids and back.

  The file is one of the `tokenizers` library, or of `hugging_face`.

  Attributes:
    base_size: number of ids of the tokenizer, or of the model that it is of.
    vocab_size: number of ids, with specials that were appended to them.
    specials: ids that stand for no text.
    hash: SHA-256 of the file, 64 hex digits.
  """

  def __init__(self, content: bytes, name: str = "given content"):
    """Reads a tokenizer from the content of its file.

    Args:
      content: what `save` writes.
      name: where it came from, for messages.

    Raises:
      UserError: not a tokenizer file, truncated, not byte-level, or with other
        special ids than `SPECIALS`.
    """
    entry = _object(content, name)
    self._content = content
    self._name = name
    self.hash: str = storage.sha256(content)
    self.specials = Specials()
    self._foreign: Foreign | None = None
    if "format" in entry:
      self._foreign, self.specials, self.base_size = hugging_face.unpack(
        entry, name
      )
      self._tokenizer = self._foreign.tokenizer
    else:
      self._tokenizer = hugging_face.parse(entry, name)
      _check(self._tokenizer, name)
      self.base_size: int = self._tokenizer.get_vocab_size()
    last = max(self.base_size - 1, *self.specials.ids)
    self.vocab_size: int = last + 1

  @classmethod
  def load(cls, path: str = "") -> "TextTokenizer":
    """Reads a tokenizer file; '' is the packaged one.

    A Hugging Face `tokenizer.json`, or the folder that holds one, is taken with
    what the configs beside it say about its special ids.

    Raises:
      UserError: no such file, or see `__init__` and `from_hugging_face`.
    """
    file = Path(path or storage.packaged(storage.TEXT_FILE))
    if file.is_dir():
      file /= hugging_face.TOKENIZER_FILE
    name = repr(str(file))
    content = storage.read(file, "text tokenizer")
    entry = _object(content, name)
    if "format" in entry or _is_ours(entry):
      return cls(content, name)
    known: dict[str, Any] = hugging_face.ids_beside(file, entry)
    return cls.from_hugging_face(content, **known, name=name)

  @classmethod
  def from_hugging_face(
    cls,
    content: bytes,
    *,
    size: int,
    bos: int | None,
    eos: int | None,
    pad: int | None = None,
    name: str = "given content",
  ) -> "TextTokenizer":
    """Makes a tokenizer of another model's, its ids in their places.

    A model with one of bos and eos separates documents by that one; where pad is
    missing, eos serves for it. Nothing is appended.

    Args:
      content: of a `tokenizer.json`.
      size: the model's number of ids; those without a piece stand for no text.
      bos: the model's id before documents, None where it has none.
      eos: its id after documents, or None.
      pad: its id for padding, or None.
      name: where it came from, for messages.

    Raises:
      UserError: not a tokenizer, of a kind that cannot be used, more ids than
        `size`, a special that is not among them, or neither bos nor eos.
    """
    entry = _object(content, name)
    hugging_face.parse(entry, name)
    given = hugging_face.specials(
      size=size, bos=bos, eos=eos, pad=pad, name=name
    )
    return cls(hugging_face.pack(entry, given, size), name)

  def with_picture_borders(self) -> "TextTokenizer":
    """This tokenizer with `<boi>` and `<eoi>`, appended where it has none."""
    if self.specials.boi is not None:
      return self
    entry = json.loads(self._content)
    size = self.base_size
    given = dataclasses.replace(self.specials, boi=size, eoi=size + 1)
    packed = hugging_face.pack(entry["tokenizer"], given, size)
    return TextTokenizer(packed, self._name)

  def tokenizer_json(self) -> bytes:
    """The content of a `tokenizer.json` for other programs."""
    if self._foreign is None:
      return self._content
    entry = json.loads(self._content)["tokenizer"]
    return json.dumps(entry, ensure_ascii=False, indent=2).encode()

  @classmethod
  def train(
    cls, texts: Iterable[str], vocab_size: int, *, progress: bool = False
  ) -> "TextTokenizer":
    """Learns merges from texts; the same texts give the same file.

    Args:
      texts: what to learn from.
      vocab_size: number of ids wanted, specials and 256 bytes included.
      progress: show the library's progress bar.

    Raises:
      UserError: too few ids for specials and bytes, or too little text to
        learn that many.
    """
    if vocab_size < SMALLEST:
      raise UserError(
        f"text tokenizer: vocab_size={vocab_size} is too small; 5 special ids"
        f" and 256 bytes need at least {SMALLEST}"
      )
    learner = _byte_level(models.BPE())
    learner.train_from_iterator(
      texts,
      trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
      ),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    if len(pieces) + len(SPECIALS) != vocab_size:
      raise UserError(
        f"text tokenizer: the texts give only {len(pieces) + len(SPECIALS)}"
        f" ids, {vocab_size} were asked for; give more text or a smaller"
        f" vocab_size"
      )
    # No piece can be spelt like a special: the splitting rule separates
    # letters from "<" and ">" before any merge.
    vocab = {piece: i for i, piece in enumerate((*SPECIALS, *pieces))}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
    return cls(tokenizer.to_str().encode())

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; no special id is added or recognised.

    Raises:
      UserError: lone surrogates, which no UTF-8 text has.
    """
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, in parallel where there are cores.

    Raises:
      UserError: lone surrogates, which no UTF-8 text has.
    """
    for text in texts:
      try:
        text.encode()
      except UnicodeEncodeError as error:
        raise UserError(
          f"text is not Unicode: lone surrogate at character {error.start} of"
          f" {text[:40]!r}; decode its bytes as UTF-8"
        ) from None
    if self._foreign is not None:
      return self._foreign.encode_batch(texts)
    batch = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in batch]

  def decode(
    self,
    ids: Sequence[int] | Int[np.ndarray, "L"],
    *,
    continues: bool = False,
  ) -> str:
    """Returns the text of ids; specials are skipped, broken UTF-8 replaced.

    Args:
      ids: of the text range.
      continues: they go on with a text. Sentencepiece-like tokenizers begin a
        text with a space that is not in it; byte-level ones know no difference.

    Raises:
      UserError: an id outside the text range.
    """
    ids = [int(i) for i in ids]
    wrong = [i for i in ids if not 0 <= i < self.vocab_size]
    if wrong:
      raise UserError(
        f"text tokenizer: id {wrong[0]} is not a text id"
        f" (0..{self.vocab_size - 1}); pass only ids of the text range"
      )
    if self._foreign is not None:
      has_text = self._foreign.has_text
      kept = [i for i in ids if i < len(has_text) and has_text[i]]
      return self._foreign.decode(kept, continues=continues)
    kept = [i for i in ids if i >= len(SPECIALS)]
    return self._tokenizer.decode(kept, skip_special_tokens=False)

  def byte_lengths(self) -> Int[np.ndarray, "vocab_size"]:
    """UTF-8 bytes each id stands for, int32; 0 for specials.

    The lengths of a text's ids sum to the length of the text in bytes. A
    sentencepiece-like tokenizer counts the space that it puts before a text, one
    byte more, and what it does not know counts nothing.
    """
    lengths = np.zeros(self.vocab_size, np.int32)
    if self._foreign is not None:
      lengths[: self.base_size] = self._foreign.byte_lengths()
      return lengths
    # The byte-level alphabet writes every byte as one character.
    for piece, index in self._tokenizer.get_vocab().items():
      if index >= len(SPECIALS):
        lengths[index] = len(piece)
    return lengths

  def save(self, path: str | Path) -> None:
    """Writes the file, whole or not at all; `load` gives the same hash.

    Raises:
      UserError: the folder cannot be written.
    """
    storage.write(path, self._content)


def _byte_level(model: models.BPE) -> Tokenizer:
  tokenizer = Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
    add_prefix_space=False
  )
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
  return tokenizer


def _check(tokenizer: Tokenizer, name: str) -> None:
  """Raises UserError where the exactness that is promised cannot hold."""
  content = json.loads(tokenizer.to_str())
  vocab = tokenizer.get_vocab()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  splitter, decoder = content["pre_tokenizer"], content["decoder"]
  faults = {
    "its model is not BPE": content["model"]["type"] != "BPE",
    "it is not byte-level": not (
      splitter
      and decoder
      and splitter["type"] == decoder["type"] == "ByteLevel"
      and not splitter["add_prefix_space"]
      and splitter["use_regex"]
    ),
    "it changes text before splitting": content["normalizer"] is not None,
    "it truncates or pads": bool(content["truncation"] or content["padding"]),
    "it drops merges at random": bool(content["model"].get("dropout")),
    "it has added tokens, which texts could spell": bool(
      content["added_tokens"]
    ),
    "it lacks some of the 256 bytes": not set(alphabet) <= set(vocab),
    "ids 0..4 are not " + " ".join(SPECIALS): any(
      vocab.get(special) != i for i, special in enumerate(SPECIALS)
    ),
    "its ids have holes": sorted(vocab.values()) != list(range(len(vocab))),
  }
  for fault, found in faults.items():
    if found:
      raise UserError(
        f"text tokenizer: {name} cannot be used: {fault}; make one with"
        f" python -m fusionlab.tokenizers train-text"
      )


def _object(content: bytes, name: str) -> dict[str, Any]:
  try:
    entry = json.loads(content)
    if not isinstance(entry, dict):
      raise ValueError("no JSON object")
  except ValueError as error:
    hugging_face.not_whole(name, error)
  return entry


def _is_ours(entry: dict[str, Any]) -> bool:
  """Whether a file of the library was made by `train`."""
  model = entry.get("model")
  vocab = model.get("vocab") if isinstance(model, dict) else None
  return isinstance(vocab, dict) and set(SPECIALS) <= vocab.keys()
