"""Picture ids: a vector-quantised autoencoder read from one small file."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Int, Shaped, UInt8

from fusionlab.config import from_mapping, to_mapping
from fusionlab.errors import UserError
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.autoencoder import (
  ImageConfig,
  init_params,
  latents_of,
  nearest_code,
  pixels_of,
)

FORMAT = "fusionlab.image_tokenizer.1"
CHUNK = 64
_REMEDY = "make one with python -m fusionlab.tokenizers train-image"


class ImageTokenizer:
  """Turns pictures into a grid of codes, row by row, and back.

  The file is safetensors: 16-bit weights, and one metadata entry "fusionlab"
  that holds JSON with "format", "config" and whatever "notes" its maker left.

  Attributes:
    config: sizes.
    codebook_size: number of codes.
    codes_per_image: codes of one picture.
    image_size: height and width of a picture in pixels.
    notes: how the file was made.
    hash: SHA-256 of the file, 64 hex digits.
  """

  def __init__(self, content: bytes, name: str = "given content"):
    """Reads a tokenizer from the content of its file.

    Args:
      content: what `save` writes.
      name: where it came from, for messages.

    Raises:
      UserError: not a safetensors file, truncated, of another kind, or with
        other tensors than its config says.
    """
    metadata, tensors = _parse(content, name)
    self.config: ImageConfig = from_mapping(
      ImageConfig, metadata["config"], f"{name} config"
    )
    _check_tensors(self.config, tensors, name)
    self.notes: dict[str, Any] = metadata.get("notes", {})
    self.codebook_size: int = self.config.codebook_size
    self.codes_per_image: int = self.config.codes_side**2
    self.image_size: int = self.config.image_size
    self.hash: str = storage.sha256(content)
    self._content = content
    weights = {k: jnp.asarray(v, jnp.float32) for k, v in tensors.items()}
    self._codebook = weights.pop("codebook")
    self._params = traverse_util.unflatten_dict(weights, sep=".")

  @classmethod
  def load(cls, path: str = "") -> "ImageTokenizer":
    """Reads a tokenizer file; '' is the packaged one.

    Raises:
      UserError: no such file, or see `__init__`.
    """
    file = path or storage.packaged(storage.IMAGE_FILE)
    return cls(storage.read(file, "image tokenizer"), repr(str(file)))

  @classmethod
  def from_params(
    cls,
    config: ImageConfig,
    params: dict,
    codebook: Any,
    notes: dict[str, Any] | None = None,
  ) -> "ImageTokenizer":
    """Makes a tokenizer of trained weights, rounded to 16 bit.

    Args:
      config: sizes.
      params: {"encoder": ..., "decoder": ...} as `autoencoder.init_params`.
      codebook: code vectors [codebook_size, code_dim].
      notes: JSON-ready; kept in the file.
    """
    tensors = dict(traverse_util.flatten_dict(params, sep="."))
    tensors["codebook"] = codebook
    tensors = {k: np.asarray(v, np.float16) for k, v in tensors.items()}
    # One entry: the library writes several in an order of its own, and equal
    # weights shall give an equal hash.
    entry = {
      "format": FORMAT,
      "config": to_mapping(config),
      "notes": notes or {},
    }
    metadata = {"fusionlab": json.dumps(entry, sort_keys=True)}
    return cls(safetensors.numpy.save(tensors, metadata))

  def encode(
    self, images: Shaped[np.ndarray, "N H W 3"]
  ) -> Int[np.ndarray, "N codes"]:
    """Returns the codes of pictures, int32 in 0..codebook_size-1.

    Args:
      images: uint8 [N, image_size, image_size, 3].

    Raises:
      UserError: another dtype or shape.
    """
    size = self.image_size
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
      raise UserError(
        f"image tokenizer: pictures are {images.dtype}{list(images.shape)};"
        f" give uint8[N, {size}, {size}, 3]"
      )
    codes = _in_chunks(self._bound(_encode_chunk), images)
    return codes.reshape(len(images), self.codes_per_image).astype(np.int32)

  def decode(
    self, codes: Shaped[np.ndarray, "N codes"]
  ) -> UInt8[np.ndarray, "N S S 3"]:
    """Returns the pictures of codes.

    Args:
      codes: integers [N, codes_per_image] in 0..codebook_size-1.

    Raises:
      UserError: another dtype or shape, or a code outside the codebook.
    """
    codes = np.asarray(codes)
    if (
      not np.issubdtype(codes.dtype, np.integer)
      or codes.ndim != 2
      or codes.shape[1] != self.codes_per_image
    ):
      raise UserError(
        f"image tokenizer: codes are {codes.dtype}{list(codes.shape)}; give"
        f" int32[N, {self.codes_per_image}]"
      )
    if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
      wrong = codes[(codes < 0) | (codes >= self.codebook_size)][0]
      raise UserError(
        f"image tokenizer: {wrong} is not a code (0..{self.codebook_size - 1});"
        f" subtract the offset of the image range from ids first"
      )
    size = self.image_size
    pixels = _in_chunks(self._bound(_decode_chunk), codes.astype(np.int32))
    return pixels.reshape(len(codes), size, size, 3).astype(np.uint8)

  def save(self, path: str | Path) -> None:
    """Writes the file, whole or not at all; `load` gives the same hash.

    Raises:
      UserError: the folder cannot be written.
    """
    storage.write(path, self._content)

  def _bound(self, function: Callable) -> Callable:
    return functools.partial(
      function, self.config, self._params, self._codebook
    )


# Compiled once for all tokenizers of a config: weights are arguments.
@functools.partial(jax.jit, static_argnums=0)
def _encode_chunk(config, params, codebook, images):
  latents = latents_of(config, params, images.astype(jnp.float32) / 255)
  return nearest_code(latents, codebook)


@functools.partial(jax.jit, static_argnums=0)
def _decode_chunk(config, params, codebook, codes):
  side = config.codes_side
  pixels = pixels_of(config, params, codebook[codes.reshape(-1, side, side)])
  return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)


def _in_chunks(function: Callable, array: np.ndarray) -> np.ndarray:
  """Applies a jitted function to CHUNK rows at a time: one shape, one compile.

  A picture's result must not depend on how many came with it.
  """
  rows = max(1, -(-len(array) // CHUNK)) * CHUNK
  padded = np.zeros((rows, *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  results = [
    np.asarray(function(padded[i : i + CHUNK])) for i in range(0, rows, CHUNK)
  ]
  return np.concatenate(results)[: len(array)]


def _parse(content: bytes, name: str) -> tuple[dict, dict[str, np.ndarray]]:
  try:
    tensors = safetensors.numpy.load(content)
  except (safetensors.SafetensorError, ValueError, KeyError) as error:
    raise UserError(
      f"image tokenizer: {name} is not a whole safetensors file"
      f" ({' '.join(str(error).split())[:120]}); {_REMEDY}"
    ) from None
  # The layout is: 8 bytes length, then that many bytes of JSON.
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
  try:
    metadata = json.loads(header["fusionlab"])
    found = metadata["format"], metadata["config"]
  except (KeyError, TypeError, ValueError):
    raise UserError(
      f"image tokenizer: {name} is a safetensors file without the metadata of"
      f" an image tokenizer; {_REMEDY}"
    ) from None
  if found[0] != FORMAT:
    raise UserError(
      f"image tokenizer: {name} has format {found[0]!r}, this version reads"
      f" {FORMAT!r}; {_REMEDY}"
    )
  return metadata, tensors


def _check_tensors(
  config: ImageConfig, tensors: dict[str, np.ndarray], name: str
) -> None:
  tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  leaves = cast(
    dict[str, jax.ShapeDtypeStruct], traverse_util.flatten_dict(tree, sep=".")
  )
  expected = {name: leaf.shape for name, leaf in leaves.items()}
  expected["codebook"] = (config.codebook_size, config.code_dim)
  for key in sorted(expected.keys() | tensors.keys()):
    given = tensors[key].shape if key in tensors else None
    if given != expected.get(key):
      raise UserError(
        f"image tokenizer: {name} has tensor {key!r} of shape {given}, its"
        f" config needs {expected.get(key)}; the file was altered: {_REMEDY}"
      )
    if not np.isfinite(tensors[key]).all():
      raise UserError(
        f"image tokenizer: {name} has values in {key!r} that are not numbers;"
        f" {_REMEDY}"
      )
