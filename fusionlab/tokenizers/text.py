"""Text ids: byte-level byte-pair encoding that loses no byte.

Ids 0..4 are the specials of the shared vocabulary. They are entries of the
vocabulary but not "added tokens", so their spelling in a text is text: the
encoder cannot be talked into an end of document.
Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford
et al. 2019 (GPT-2), §2.2.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusionlab.errors import UserError
from fusionlab.tokenizers import storage

SPECIALS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>")
SMALLEST = len(SPECIALS) + 256


class TextTokenizer:
  """Turns text into ids and back; the file is one of the `tokenizers` library.

  Attributes:
    vocab_size: number of ids, the specials included.
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
    try:
      tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
      raise UserError(
        f"text tokenizer: {name} is not a whole file of the tokenizers library"
        f" ({_one_line(error)}); make one with python -m fusionlab.tokenizers"
        f" train-text"
      ) from None
    _check(tokenizer, name)
    self._content = content
    self._tokenizer = tokenizer
    self.vocab_size: int = tokenizer.get_vocab_size()
    self.hash: str = storage.sha256(content)

  @classmethod
  def load(cls, path: str = "") -> "TextTokenizer":
    """Reads a tokenizer file; '' is the packaged one.

    Raises:
      UserError: no such file, or see `__init__`.
    """
    file = path or storage.packaged(storage.TEXT_FILE)
    return cls(storage.read(file, "text tokenizer"), repr(str(file)))

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
    batch = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in batch]

  def decode(self, ids: Sequence[int] | Int[np.ndarray, "L"]) -> str:
    """Returns the text of ids; specials are skipped, broken UTF-8 replaced.

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
    kept = [i for i in ids if i >= len(SPECIALS)]
    return self._tokenizer.decode(kept, skip_special_tokens=False)

  def byte_lengths(self) -> Int[np.ndarray, "vocab_size"]:
    """UTF-8 bytes each id stands for, int32; 0 for specials.

    The lengths of a text's ids sum to the length of the text in bytes.
    """
    # The byte-level alphabet writes every byte as one character.
    lengths = np.zeros(self.vocab_size, np.int32)
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


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:120]
