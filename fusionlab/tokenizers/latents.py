"""Continuous pictures: a KL autoencoder read from one small file.

A picture becomes the mean of its posterior (latent diffusion: Rombach et al. 2022,
arXiv:2112.10752, §3.1), normalised, and cut into the patches that a transformer
has as positions (Transfusion: Zhou et al. 2024, arXiv:2408.11039, §3.1).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Shaped, UInt8

from fusionlab.batch import LatentGrid
from fusionlab.errors import UserError
from fusionlab.nn.functional.patches import patchify, unpatchify
from fusionlab.tokenizers import storage
from fusionlab.tokenizers.autoencoder import (
  LatentConfig,
  latents_of,
  pixels_of,
)
from fusionlab.tokenizers.picture_file import PictureTokenizer, in_chunks, pack

# Of log-variances, as in latent diffusion: outside of it, exp is of no use.
_LOG_VARIANCE = (-30.0, 20.0)


class LatentTokenizer(PictureTokenizer[LatentConfig]):
  """Turns pictures into patches of latents and back.

  Every channel of a latent has mean 0 and variance 1 over the training pictures
  (their statistics are in the file, in 32 bit beside weights in 16), so that
  noise of variance 1 fits them. See `PictureTokenizer` for the file.

  Attributes:
    grid: sides, channels and patches of a picture's latents.
  """

  kind = "latent tokenizer"
  format = "fusionlab.latent_tokenizer.1"
  verb = "train-latents"
  packaged = storage.LATENT_FILE
  _config_type = LatentConfig

  @classmethod
  def from_params(
    cls,
    config: LatentConfig,
    params: dict,
    mean: Any,
    std: Any,
    notes: dict[str, Any] | None = None,
  ) -> "LatentTokenizer":
    """Makes a tokenizer of trained weights, rounded to 16 bit.

    Args:
      config: sizes.
      params: {"encoder": ..., "decoder": ...} as `autoencoder.init_params`.
      mean: of the posteriors' means over the training pictures [channels].
      std: their standard deviation [channels], positive.
      notes: JSON-ready; kept in the file.

    Raises:
      UserError: a standard deviation that is not positive.
    """
    extra = {
      "mean": np.asarray(mean, np.float32),
      "std": np.asarray(std, np.float32),
    }
    return cls._pack(config, params, extra, notes)

  def with_patch(self, patch: int) -> "LatentTokenizer":
    """The same autoencoder with patches of another size, and another hash.

    Args:
      patch: k, latents along a side of a patch.

    Raises:
      UserError: k does not divide the side, with what does.
    """
    config = self.config
    if patch not in config.patches:
      raise UserError(
        f"{self.kind}: patches of {patch} do not tile its {config.side} x"
        f" {config.side} latents; allowed: {_listed(config.patches)}"
      )
    if patch == config.patch:
      return self
    config = dataclasses.replace(config, patch=patch)
    tensors = safetensors.numpy.load(self._content)
    return LatentTokenizer(pack(self.format, config, tensors, self.notes))

  def encode(
    self, images: Shaped[np.ndarray, "N H W 3"]
  ) -> Float[np.ndarray, "N n C"]:
    """Returns the patches of pictures in raster order, normalised.

    Args:
      images: uint8 [N, image_size, image_size, 3], RGB.

    Returns:
      float32; what is in a patch is in the order (row, column, channel).

    Raises:
      UserError: another dtype or shape.
    """
    encode = functools.partial(
      _encode_chunk, self.config, self._params, self._mean, self._std
    )
    return in_chunks(encode, self._check_pictures(images))

  def decode(
    self, patches: Shaped[np.ndarray, "N n C"]
  ) -> UInt8[np.ndarray, "N S S 3"]:
    """Returns the pictures of patches as `encode` gives them.

    Args:
      patches: float [N, grid.positions, grid.dim].

    Raises:
      UserError: another dtype or shape, or values that are not numbers.
    """
    patches = np.asarray(patches)
    shape = (self.grid.positions, self.grid.dim)
    if (
      not jnp.issubdtype(patches.dtype, jnp.floating)
      or patches.shape[1:] != shape
    ):
      raise UserError(
        f"{self.kind}: patches are {patches.dtype}{list(patches.shape)}; give"
        f" float32[N, {shape[0]}, {shape[1]}]"
      )
    patches = patches.astype(np.float32)
    if not np.isfinite(patches).all():
      raise UserError(
        f"{self.kind}: patches hold values that are not numbers; check what"
        f" made them"
      )
    decode = functools.partial(
      _decode_chunk, self.config, self._params, self._mean, self._std
    )
    return in_chunks(decode, patches)

  def posterior(
    self, images: Shaped[np.ndarray, "N H W 3"]
  ) -> tuple[Float[np.ndarray, "N h w c"], Float[np.ndarray, "N h w c"]]:
    """Returns mean and log-variance of the latents, not normalised, float32.

    Args:
      images: uint8 [N, image_size, image_size, 3], RGB.

    Raises:
      UserError: another dtype or shape.
    """
    function = functools.partial(_posterior_chunk, self.config, self._params)
    both = in_chunks(function, self._check_pictures(images))
    return both[..., 0], both[..., 1]

  def _extra_shapes(self) -> dict[str, tuple[int, ...]]:
    return {"mean": (self.config.channels,), "std": (self.config.channels,)}

  def _use(self, tensors: dict[str, np.ndarray]) -> None:
    if not (tensors["std"] > 0).all():
      raise UserError(
        f"{self.kind}: a channel does not vary over the training pictures"
        f" (std {_listed(tensors['std'].tolist())}); train on more pictures,"
        f" longer, or with fewer channels"
      )
    config = self.config
    self.grid: LatentGrid = LatentGrid(
      side=config.side, patch=config.patch, channels=config.channels
    )
    self._params = self._weights(tensors)
    self._mean = jnp.asarray(tensors["mean"], jnp.float32)
    self._std = jnp.asarray(tensors["std"], jnp.float32)


def posterior_of(
  config: LatentConfig, params: dict, pixels: Float[jax.Array, "N S S 3"]
) -> tuple[Float[jax.Array, "N h w c"], Float[jax.Array, "N h w c"]]:
  """Mean and log-variance of the latents of pictures in 0..1."""
  mean, log_variance = jnp.split(latents_of(config, params, pixels), 2, -1)
  return mean, jnp.clip(log_variance, *_LOG_VARIANCE)


def _listed(values) -> str:
  return ", ".join(map(str, values))


# Compiled once for all tokenizers of a config: weights are arguments.
@functools.partial(jax.jit, static_argnums=0)
def _posterior_chunk(config, params, images):
  pixels = images.astype(jnp.float32) / 255
  return jnp.stack(posterior_of(config, params, pixels), -1)


@functools.partial(jax.jit, static_argnums=0)
def _encode_chunk(config, params, mean, std, images):
  latents, _ = posterior_of(config, params, images.astype(jnp.float32) / 255)
  return patchify((latents - mean) / std, config.patch)


@functools.partial(jax.jit, static_argnums=0)
def _decode_chunk(config, params, mean, std, patches):
  latents = unpatchify(patches, config.patch) * std + mean
  pixels = pixels_of(config, params, latents)
  return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)
