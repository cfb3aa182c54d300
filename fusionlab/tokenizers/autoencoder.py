"""The convolutional autoencoder of both picture tokenizers.

Pictures `[N, S, S, 3]` become a grid of latents `[N, S/2p, S/2p, D]` (patches of
p pixels, residual blocks, space to depth, residual blocks), and latents become
pictures by the mirror image. Between the two stands a codebook, each latent the
nearest of K code vectors (VQ-VAE: van den Oord et al. 2017, arXiv:1711.00937,
§3), or a normal distribution whose mean and log-variance the encoder gives
(KL-VAE: Rombach et al. 2022, arXiv:2112.10752, §3.1 and appendix G).
"""

import abc
import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.config import option
from fusionlab.errors import ConfigError
from fusionlab.nn.functional.patches import depth_to_space, space_to_depth


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(abc.ABC):
  """Sizes of the convolutions, which both picture tokenizers have."""

  image_size: int = option(64, "height and width in pixels", minimum=2)
  fine_channels: int = option(64, "channels on the grid of patches", minimum=1)
  coarse_channels: int = option(
    96, "channels on the grid of latents", minimum=1
  )
  encoder_fine_blocks: int = option(1, "residual blocks on patches", minimum=0)
  encoder_coarse_blocks: int = option(
    2, "residual blocks on latents", minimum=0
  )
  decoder_coarse_blocks: int = option(
    2, "residual blocks on latents", minimum=0
  )
  decoder_fine_blocks: int = option(2, "residual blocks on patches", minimum=0)

  @property
  @abc.abstractmethod
  def pixels_per_patch(self) -> int:
    """Pixels along a side of what the first convolution sees."""

  @property
  @abc.abstractmethod
  def encoder_width(self) -> int:
    """Channels that come out of the encoder."""

  @property
  @abc.abstractmethod
  def decoder_width(self) -> int:
    """Channels that go into the decoder."""

  @property
  def side(self) -> int:
    """Latents along one side of a picture."""
    return self.image_size // (2 * self.pixels_per_patch)


@dataclasses.dataclass(frozen=True)
class ImageConfig(AutoencoderConfig):
  """Sizes of a tokenizer of picture codes; they are stored in its file."""

  patch: int = option(
    4, "pixels of a patch's side; a code stands for twice that", minimum=1
  )
  codebook_size: int = option(512, "number of codes", minimum=2)
  code_dim: int = option(16, "width of a code vector", minimum=1)

  @property
  def pixels_per_patch(self) -> int:
    """Pixels along a side of a patch; a code stands for twice that."""
    return self.patch

  @property
  def encoder_width(self) -> int:
    """Channels of what is compared with the codes."""
    return self.code_dim

  @property
  def decoder_width(self) -> int:
    """Channels of a code vector."""
    return self.code_dim

  def check(self, path: str) -> None:
    """Raises ConfigError where codes do not tile the picture."""
    if self.image_size % (2 * self.patch):
      raise ConfigError(
        f"{path}.image_size={self.image_size} is not a multiple of"
        f" {2 * self.patch} (twice {path}.patch={self.patch}), the pixels that"
        f" one code stands for"
      )


@dataclasses.dataclass(frozen=True)
class LatentConfig(AutoencoderConfig):
  """Sizes of a tokenizer of continuous latents; they are stored in its file."""

  fine_channels: int = option(32, "channels on the grid of patches", minimum=1)
  coarse_channels: int = option(
    64, "channels on the grid of latents", minimum=1
  )
  downsampling: int = option(
    4, "pixels along a side of a latent; an even number", minimum=2
  )
  channels: int = option(4, "channels of a latent", minimum=1)
  patch: int = option(
    2, "latents along a side of a position of the transformer", minimum=1
  )

  @property
  def pixels_per_patch(self) -> int:
    """Pixels along a side of what the first convolution sees."""
    return self.downsampling // 2

  @property
  def encoder_width(self) -> int:
    """Channels of a posterior: its mean, then its log-variance."""
    return 2 * self.channels

  @property
  def decoder_width(self) -> int:
    """Channels of a latent."""
    return self.channels

  def check(self, path: str) -> None:
    """Raises ConfigError where latents or positions do not tile the picture."""
    if self.downsampling % 2 or self.image_size % self.downsampling:
      raise ConfigError(
        f"{path}.downsampling={self.downsampling} must be even and divide"
        f" {path}.image_size={self.image_size}"
      )
    if self.side % self.patch:
      raise ConfigError(
        f"{path}.patch={self.patch} does not divide the {self.side} latents"
        f" along a side of a picture; allowed:"
        f" {', '.join(map(str, self.patches))}"
      )

  @property
  def patches(self) -> tuple[int, ...]:
    """What `patch` may be: the divisors of `side`."""
    return tuple(k for k in range(1, self.side + 1) if self.side % k == 0)


def convolve(
  x: Float[Array, "N H W C"], kernel: Float[Array, "h w C D"]
) -> Float[Array, "N H W D"]:
  """Same-size 2D convolution in full float32 on every device.

  Codes and latents are stored once and compared for ever, so the reduced
  precision that accelerators prefer for float32 products is not for here.
  """
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )


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
  """Pictures in 0..1 to latents, or to the two halves of their posterior."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(
    self, pixels: Float[Array, "N S S 3"]
  ) -> Float[Array, "N h w D"]:
    c = self.config
    x = space_to_depth(pixels - 0.5, c.pixels_per_patch)
    x = Convolution(c.fine_channels, name="patches")(x)
    for i in range(c.encoder_fine_blocks):
      x = ResidualBlock(name=f"fine_{i}")(x)
    x = Convolution(c.coarse_channels, name="merge")(space_to_depth(x, 2))
    for i in range(c.encoder_coarse_blocks):
      x = ResidualBlock(name=f"coarse_{i}")(x)
    return Convolution(c.encoder_width, name="latents")(x)


class Decoder(nn.Module):
  """Code vectors or latents to pictures, about 0..1 (not clipped)."""

  config: AutoencoderConfig

  @nn.compact
  def __call__(
    self, latents: Float[Array, "N h w D"]
  ) -> Float[Array, "N S S 3"]:
    c = self.config
    x = Convolution(c.coarse_channels, name="latents")(latents)
    for i in range(c.decoder_coarse_blocks):
      x = ResidualBlock(name=f"coarse_{i}")(x)
    x = depth_to_space(Convolution(4 * c.fine_channels, name="split")(x), 2)
    for i in range(c.decoder_fine_blocks):
      x = ResidualBlock(name=f"fine_{i}")(x)
    x = Convolution(3 * c.pixels_per_patch**2, name="patches")(nn.relu(x))
    return depth_to_space(x, c.pixels_per_patch) + 0.5


def latents_of(
  config: AutoencoderConfig, params: dict, pixels: Float[Array, "N S S 3"]
) -> Float[Array, "N h w D"]:
  """Applies the encoder of `init_params`' tree to pictures in 0..1."""
  latents = Encoder(config).apply({"params": params["encoder"]}, pixels)
  return cast(Array, latents)


def pixels_of(
  config: AutoencoderConfig, params: dict, vectors: Float[Array, "N h w D"]
) -> Float[Array, "N S S 3"]:
  """Applies the decoder of `init_params`' tree to code vectors or latents."""
  pixels = Decoder(config).apply({"params": params["decoder"]}, vectors)
  return cast(Array, pixels)


def init_params(config: AutoencoderConfig, key: jax.Array) -> dict:
  """Returns {"encoder": ..., "decoder": ...}, nested dicts of float32."""
  return _init_params(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: AutoencoderConfig, key: jax.Array) -> dict:
  size, side = config.image_size, config.side
  pixels = jnp.zeros((1, size, size, 3))
  latents = jnp.zeros((1, side, side, config.decoder_width))
  encoder_key, decoder_key = jax.random.split(key)
  return {
    "encoder": Encoder(config).init(encoder_key, pixels)["params"],
    "decoder": Decoder(config).init(decoder_key, latents)["params"],
  }
