"""What both picture tokenizers are: one small file of a config and weights.

The file is safetensors with one metadata entry "fusionlab": JSON with "format",
"config" and whatever "notes" its maker left.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Shaped

from fusionlab.config import from_mapping, to_mapping
from fusionlab.errors import UserError
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.autoencoder import AutoencoderConfig, init_params

CHUNK = 64
MAKER = "python -m fusionlab.tokenizers"
Config = TypeVar("Config", bound=AutoencoderConfig)
# typing.Self, which beartype refuses on a method.
Itself = TypeVar("Itself", bound="PictureTokenizer")


class PictureTokenizer(ABC, Generic[Config]):
  """A tokenizer of pictures, read from the content of its file.

  Attributes:
    kind: what messages call it.
    format: the file's format, with its version.
    verb: of `python -m fusionlab.tokenizers`, which makes such a file.
    packaged: name of the file that the package carries.
    config: sizes.
    image_size: height and width of a picture in pixels.
    notes: how the file was made.
    hash: SHA-256 of the file, 64 hex digits.
  """

  kind: ClassVar[str]
  format: ClassVar[str]
  verb: ClassVar[str]
  packaged: ClassVar[str]
  _config_type: ClassVar[type]

  def __init__(self, content: bytes, name: str = "given content"):
    """Reads a tokenizer from the content of its file.

    Args:
      content: what `save` writes.
      name: where it came from, for messages.

    Raises:
      UserError: not a safetensors file, truncated, of another kind, or with
        other tensors than its config says.
    """
    remedy = f"make one with {MAKER} {self.verb}"
    entry = read_entry(content, name, self.kind, remedy)
    if entry["format"] != self.format:
      raise UserError(
        f"{self.kind}: {name} has format {entry['format']!r}, this version"
        f" reads {self.format!r}; {remedy}"
      )
    tensors = safetensors.numpy.load(content)
    self.config: Config = from_mapping(
      self._config_type, entry["config"], f"{name} config"
    )
    _check_tensors(tensors, self._shapes(), f"{self.kind}: {name}", remedy)
    self.notes: dict[str, Any] = entry["notes"]
    self.image_size: int = self.config.image_size
    self.hash: str = storage.sha256(content)
    self._content = content
    self._use(tensors)

  @classmethod
  def load(cls: type[Itself], path: str = "") -> Itself:
    """Reads a tokenizer file; '' is the packaged one.

    Raises:
      UserError: no such file, or see `__init__`.
    """
    file = path or storage.packaged(cls.packaged)
    return cls(storage.read(file, cls.kind), repr(str(file)))

  def save(self, path: str | Path) -> None:
    """Writes the file, whole or not at all; `load` gives the same hash.

    Raises:
      UserError: the folder cannot be written.
    """
    storage.write(path, self._content)

  @abstractmethod
  def _extra_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors beside the autoencoder's weights."""

  @abstractmethod
  def _use(self, tensors: dict[str, np.ndarray]) -> None:
    """Keeps the tensors, which are those that `_shapes` names."""

  @classmethod
  def _pack(
    cls: type[Itself],
    config: AutoencoderConfig,
    params: dict,
    extra: dict[str, np.ndarray],
    notes: dict[str, Any] | None,
  ) -> Itself:
    """A tokenizer of weights, rounded to 16 bit, and of tensors as they are."""
    weights = cast(dict[str, Any], traverse_util.flatten_dict(params, sep="."))
    tensors = {k: np.asarray(v, np.float16) for k, v in weights.items()}
    return cls(pack(cls.format, config, tensors | extra, notes or {}))

  def _shapes(self) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: init_params(self.config, jax.random.key(0)))
    leaves = cast(
      dict[str, jax.ShapeDtypeStruct], traverse_util.flatten_dict(tree, sep=".")
    )
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    return shapes | self._extra_shapes()

  def _weights(self, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The autoencoder's tree, float32: see `autoencoder.init_params`."""
    weights = {
      name: jnp.asarray(tensor, jnp.float32)
      for name, tensor in tensors.items()
      if name not in self._extra_shapes()
    }
    return traverse_util.unflatten_dict(weights, sep=".")

  def _check_pictures(
    self, images: Shaped[np.ndarray, "N H W 3"]
  ) -> Shaped[np.ndarray, "N H W 3"]:
    size = self.image_size
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
      raise UserError(
        f"{self.kind}: pictures are {images.dtype}{list(images.shape)};"
        f" give uint8[N, {size}, {size}, 3]"
      )
    return images


def pack(
  format: str,
  config: AutoencoderConfig,
  tensors: dict[str, np.ndarray],
  notes: dict[str, Any],
) -> bytes:
  """Returns the content of a file; equal tensors give equal content.

  Args:
    format: what the file is, with its version.
    config: sizes.
    tensors: weights by name.
    notes: JSON-ready; kept in the file.
  """
  # One entry: the library writes several in an order of its own.
  entry = {"format": format, "config": to_mapping(config), "notes": notes}
  metadata = {"fusionlab": json.dumps(entry, sort_keys=True)}
  return safetensors.numpy.save(tensors, metadata)


def read_entry(
  content: bytes, name: str, kind: str, remedy: str
) -> dict[str, Any]:
  """Returns what a file says of itself: "format", "config", "notes".

  Args:
    content: of the file.
    name: where it came from, for messages.
    kind: what it should be, for messages ("image tokenizer").
    remedy: what to do about a file that is another.

  Raises:
    UserError: not a whole safetensors file, or one without such an entry.
  """
  try:
    safetensors.numpy.load(content)
  except (safetensors.SafetensorError, ValueError, KeyError) as error:
    raise UserError(
      f"{kind}: {name} is not a whole safetensors file"
      f" ({' '.join(str(error).split())[:120]}); {remedy}"
    ) from None
  # The layout is: 8 bytes length, then that many bytes of JSON.
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
  try:
    entry = json.loads(header["fusionlab"])
    said = {key: entry[key] for key in ("format", "config")}
  except (KeyError, TypeError, ValueError):
    raise UserError(
      f"{kind}: {name} is a safetensors file without the metadata of a picture"
      f" tokenizer; {remedy}"
    ) from None
  return {"notes": entry.get("notes", {})} | said


def in_chunks(function: Callable, array: np.ndarray) -> np.ndarray:
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


def _check_tensors(
  tensors: dict[str, np.ndarray],
  expected: dict[str, tuple[int, ...]],
  what: str,
  remedy: str,
) -> None:
  for key in sorted(expected.keys() | tensors.keys()):
    given = tensors[key].shape if key in tensors else None
    if given != expected.get(key):
      raise UserError(
        f"{what} has tensor {key!r} of shape {given}, its config needs"
        f" {expected.get(key)}; the file was altered: {remedy}"
      )
    if not np.isfinite(tensors[key]).all():
      raise UserError(
        f"{what} has values in {key!r} that are not numbers; {remedy}"
      )
