"""Picture ids: a vector-quantised autoencoder read from one small file."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from fusionlab.errors import UserError
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.autoencoder import (
  ImageConfig,
  latents_of,
  nearest_code,
  pixels_of,
)
from fusionlab.tokenizers.picture_file import PictureTokenizer, in_chunks


class ImageTokenizer(PictureTokenizer[ImageConfig]):
  """Turns pictures into a grid of codes, row by row, and back.

  The weights are stored in 16 bit; see `PictureTokenizer` for the file.

  Attributes:
    codebook_size: number of codes.
    codes_per_image: codes of one picture.
  """

  kind = "image tokenizer"
  format = "fusionlab.image_tokenizer.1"
  verb = "train-image"
  packaged = storage.IMAGE_FILE
  _config_type = ImageConfig

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
    extra = {"codebook": np.asarray(codebook, np.float16)}
    return cls._pack(config, params, extra, notes)

  def encode(
    self, images: Shaped[np.ndarray, "N H W 3"]
  ) -> Int[np.ndarray, "N codes"]:
    """Returns the codes of pictures, int32 in 0..codebook_size-1.

    Args:
      images: uint8 [N, image_size, image_size, 3].

    Raises:
      UserError: another dtype or shape.
    """
    images = self._check_pictures(images)
    codes = in_chunks(self._bound(_encode_chunk), images)
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
    pixels = in_chunks(self._bound(_decode_chunk), codes.astype(np.int32))
    return pixels.reshape(len(codes), size, size, 3).astype(np.uint8)

  def _extra_shapes(self) -> dict[str, tuple[int, ...]]:
    return {"codebook": (self.config.codebook_size, self.config.code_dim)}

  def _use(self, tensors: dict[str, np.ndarray]) -> None:
    self.codebook_size: int = self.config.codebook_size
    self.codes_per_image: int = self.config.side**2
    self._params = self._weights(tensors)
    self._codebook = jnp.asarray(tensors["codebook"], jnp.float32)

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
  side = config.side
  pixels = pixels_of(config, params, codebook[codes.reshape(-1, side, side)])
  return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)
