"""`check`: a Hugging Face folder against logits that another program gave."""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fusionlab.batch import Vocabulary, batch_of_ids
from fusionlab.errors import UserError
from fusionlab.interop import hugging_face
from fusionlab.models import build_model

TOLERANCE = 1e-4
_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
_CHUNK = 2**26  # logits held at a time


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two programs' logits are apart.

  Attributes:
    difference: the largest absolute one; NaN where one of them has NaN.
    kl_mean, kl_max: KL(reference || ours) of the next id's distribution, in
      nats, over the positions.
    positions: how many there are.
  """

  difference: float
  kl_mean: float
  kl_max: float
  positions: int

  @property
  def within(self) -> bool:
    """Whether the difference is at most `TOLERANCE`."""
    return self.difference <= TOLERANCE


def check(folder: Path, reference: Path) -> Agreement:
  """Runs a model on the reference's ids, in float32.

  Rows and positions are taken in pieces, of the reference's file too.

  Args:
    folder: a Hugging Face folder; its tokenizer is not needed.
    reference: an .npz with `input_ids` [B, L], integers, and `logits` [B, L, V].

  Raises:
    UserError: a folder that cannot be read, or arrays that are not these.
  """
  source = hugging_face.read(folder)
  ids = _input_ids(reference, source.vocab_size)
  number, length = ids.shape
  shape = (number, length, source.vocab_size)
  theirs = _rows(reference, shape)
  config = dataclasses.replace(source.config, compute_dtype="float32")
  vocabulary = Vocabulary(("text",), (source.vocab_size,))
  model = build_model(config, vocabulary)
  params = jax.tree.map(jnp.asarray, source.params())

  @jax.jit
  def hidden_of(params: Any, batch: Any) -> jax.Array:
    return model.apply({"params": params}, batch)  # pyright: ignore

  logits_of = jax.jit(model.logits)
  step = max(1, _CHUNK // source.vocab_size)
  differences, kls = [], []
  with jax.default_matmul_precision("highest"):
    for row, reference_row in zip(ids, theirs, strict=True):
      batch = batch_of_ids([row.tolist()], vocabulary, towers=(0,))
      hidden = hidden_of(params, batch)[0]
      for first in range(0, length, step):
        here = slice(first, first + step)
        ours = np.asarray(logits_of(params, hidden[here]))
        difference, kl = compare(ours, reference_row[here])
        differences.append(difference)
        kls.append(kl)
  kl = np.concatenate(kls)
  return Agreement(
    float(np.max(differences)), float(kl.mean()), float(kl.max()), kl.size
  )


def compare(
  ours: Float[np.ndarray, "L V"], theirs: Float[np.ndarray, "L V"]
) -> tuple[float, Float[np.ndarray, " L"]]:
  """The largest absolute difference, and KL(theirs || ours) of each position.

  Args:
    ours: logits.
    theirs: those of the reference, of the same positions.

  Returns:
    The difference and float64 nats.
  """
  p, q = (_log_softmax(np.asarray(a, np.float64)) for a in (theirs, ours))
  difference = float(np.abs(np.float64(ours) - np.float64(theirs)).max())
  # Rounding may leave a sum of this kind a little below zero.
  return difference, np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _input_ids(path: Path, vocab_size: int) -> Int[np.ndarray, "B L"]:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      missing = {"input_ids", "logits"} - set(arrays.files)
      if missing:
        raise UserError(f"{path} has no array {min(missing)!r}")
      ids = arrays["input_ids"]
      if (
        "attention_mask" in arrays.files and not arrays["attention_mask"].all()
      ):
        raise UserError(
          f"{path}: attention_mask leaves ids out; only whole rows are supported"
        )
  except _BROKEN as error:
    raise _no_npz(path, error) from error
  if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
    raise UserError(
      f"{path}: input_ids is {ids.dtype}{list(ids.shape)}; it must be integers"
      f" [B, L]"
    )
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise UserError(
      f"{path}: input_ids has ids from {ids.min()} to {ids.max()}; the model has"
      f" 0 to {vocab_size - 1}"
    )
  return ids


def _rows(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
  """Yields `logits` row by row, reading a file that is larger than memory.

  The header is looked at before the first row is asked for.
  """
  try:
    with zipfile.ZipFile(path) as archive, archive.open("logits.npy") as file:
      found, fortran, dtype = _header(file)
  except _BROKEN as error:
    raise _no_npz(path, error) from error
  if found != shape or dtype.kind != "f" or fortran:
    order = " in Fortran order" if fortran else ""
    raise UserError(
      f"{path}: logits is {dtype}{list(found)}{order}; it must be floats"
      f" {list(shape)} (B, L of input_ids, V of the model)"
    )

  def read() -> Iterator[np.ndarray]:
    size = shape[1] * shape[2] * dtype.itemsize
    try:
      with zipfile.ZipFile(path) as archive, archive.open("logits.npy") as file:
        _header(file)
        for _ in range(shape[0]):
          content = file.read(size)
          if len(content) < size:
            raise EOFError("it ends within logits")
          yield np.frombuffer(content, dtype).reshape(shape[1:])
    except _BROKEN as error:
      raise _no_npz(path, error) from error

  return read()


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, order and dtype of an array in NumPy's own format."""
  version = np.lib.format.read_magic(file)
  if version == (1, 0):
    return np.lib.format.read_array_header_1_0(file)
  return np.lib.format.read_array_header_2_0(file)


def _no_npz(path: Path, error: Exception) -> UserError:
  if isinstance(error, FileNotFoundError):
    return UserError(f"{path} does not exist; give an .npz")
  said = " ".join(str(error).split())[:160]
  return UserError(f"{path} is no readable .npz ({said})")
