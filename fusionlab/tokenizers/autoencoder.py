"""The convolutional autoencoder around a codebook of picture codes (VQ-VAE).

Pictures `[N, S, S, 3]` become a grid of latents `[N, S/2p, S/2p, D]` (patches of
p pixels, residual blocks, space to depth, residual blocks), each latent the
nearest of K code vectors, and codes become pictures by the mirror image.
Vector quantisation: van den Oord et al. 2017, arXiv:1711.00937, §3.
"""

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.config import option
from fusionlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """Sizes of a picture tokenizer; they are stored in its file."""

  image_size: int = option(64, "height and width in pixels", minimum=2)
  patch: int = option(
    4, "pixels of a patch's side; a code stands for twice that", minimum=1
  )
  codebook_size: int = option(512, "number of codes", minimum=2)
  code_dim: int = option(16, "width of a code vector", minimum=1)
  fine_channels: int = option(64, "channels on the grid of patches", minimum=1)
  coarse_channels: int = option(96, "channels on the grid of codes", minimum=1)
  encoder_fine_blocks: int = option(1, "residual blocks on patches", minimum=0)
  encoder_coarse_blocks: int = option(2, "residual blocks on codes", minimum=0)
  decoder_coarse_blocks: int = option(2, "residual blocks on codes", minimum=0)
  decoder_fine_blocks: int = option(2, "residual blocks on patches", minimum=0)

  @property
  def codes_side(self) -> int:
    """Codes along one side of a picture."""
    return self.image_size // (2 * self.patch)

  def check(self, path: str) -> None:
    """Raises ConfigError where codes do not tile the picture."""
    if self.image_size % (2 * self.patch):
      raise ConfigError(
        f"{path}.image_size={self.image_size} is not a multiple of"
        f" {2 * self.patch} (twice {path}.patch={self.patch}), the pixels that"
        f" one code stands for"
      )


def convolve(
  x: Float[Array, "N H W C"], kernel: Float[Array, "h w C D"]
) -> Float[Array, "N H W D"]:
  """Same-size 2D convolution in full float32 on every device.

  Codes are stored once and compared for ever, so the reduced precision that
  accelerators prefer for float32 products is not for here.
  """
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )


def space_to_depth(
  x: Float[Array, "N H W C"], side: int
) -> Float[Array, "N h w D"]:
  """Folds squares of `side` positions into channels."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // side, side, width // side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height // side, width // side, side * side * channels)


def depth_to_space(
  x: Float[Array, "N h w D"], side: int
) -> Float[Array, "N H W C"]:
  """Inverse of `space_to_depth`."""
  n, height, width, depth = x.shape
  channels = depth // (side * side)
  x = x.reshape(n, height, width, side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height * side, width * side, channels)


def nearest_code(
  latents: Float[Array, "*s D"], codebook: Float[Array, "K D"]
) -> Int[Array, "*s"]:
  """Index of the code vector at the least Euclidean distance, int32."""
  products = jnp.matmul(
    latents, codebook.T, precision=jax.lax.Precision.HIGHEST
  )
  # |z|² is the same for all codes, so it is left out.
  return jnp.argmin((codebook**2).sum(-1) - 2 * products, axis=-1).astype(
    jnp.int32
  )


class Convolution(nn.Module):
  """A convolution with bias; parameters `kernel` and `bias`."""

  features: int
  side: int = 1
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W D"]:
    kernel = self.param(
      "kernel",
      nn.initializers.variance_scaling(self.scale, "fan_in", "normal"),
      (self.side, self.side, x.shape[-1], self.features),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return convolve(x, kernel) + bias


class ResidualBlock(nn.Module):
  """x + conv1x1(relu(conv3x3(relu(x)))), small at first."""

  @nn.compact
  def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
    channels = x.shape[-1]
    h = Convolution(channels, 3, 2.0, name="spatial")(nn.relu(x))
    return x + Convolution(channels, 1, 0.1, name="pointwise")(nn.relu(h))


class Encoder(nn.Module):
  """Pictures in 0..1 to latents, one per code of the grid."""

  config: ImageConfig

  @nn.compact
  def __call__(
    self, pixels: Float[Array, "N S S 3"]
  ) -> Float[Array, "N h w D"]:
    c = self.config
    x = space_to_depth(pixels - 0.5, c.patch)
    x = Convolution(c.fine_channels, name="patches")(x)
    for i in range(c.encoder_fine_blocks):
      x = ResidualBlock(name=f"fine_{i}")(x)
    x = Convolution(c.coarse_channels, name="merge")(space_to_depth(x, 2))
    for i in range(c.encoder_coarse_blocks):
      x = ResidualBlock(name=f"coarse_{i}")(x)
    return Convolution(c.code_dim, name="latents")(x)


class Decoder(nn.Module):
  """Code vectors to pictures, about 0..1 (not clipped)."""

  config: ImageConfig

  @nn.compact
  def __call__(self, codes: Float[Array, "N h w D"]) -> Float[Array, "N S S 3"]:
    c = self.config
    x = Convolution(c.coarse_channels, name="latents")(codes)
    for i in range(c.decoder_coarse_blocks):
      x = ResidualBlock(name=f"coarse_{i}")(x)
    x = depth_to_space(Convolution(4 * c.fine_channels, name="split")(x), 2)
    for i in range(c.decoder_fine_blocks):
      x = ResidualBlock(name=f"fine_{i}")(x)
    x = Convolution(3 * c.patch**2, name="patches")(nn.relu(x))
    return depth_to_space(x, c.patch) + 0.5


def latents_of(
  config: ImageConfig, params: dict, pixels: Float[Array, "N S S 3"]
) -> Float[Array, "N h w D"]:
  """Applies the encoder of `init_params`' tree to pictures in 0..1."""
  latents = Encoder(config).apply({"params": params["encoder"]}, pixels)
  return cast(Array, latents)


def pixels_of(
  config: ImageConfig, params: dict, vectors: Float[Array, "N h w D"]
) -> Float[Array, "N S S 3"]:
  """Applies the decoder of `init_params`' tree to code vectors."""
  pixels = Decoder(config).apply({"params": params["decoder"]}, vectors)
  return cast(Array, pixels)


def init_params(config: ImageConfig, key: jax.Array) -> dict:
  """Returns {"encoder": ..., "decoder": ...}, nested dicts of float32."""
  return _init_params(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: ImageConfig, key: jax.Array) -> dict:
  size, side = config.image_size, config.codes_side
  pixels = jnp.zeros((1, size, size, 3))
  codes = jnp.zeros((1, side, side, config.code_dim))
  encoder_key, decoder_key = jax.random.split(key)
  return {
    "encoder": Encoder(config).init(encoder_key, pixels)["params"],
    "decoder": Decoder(config).init(decoder_key, codes)["params"],
  }
