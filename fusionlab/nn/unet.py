"""The two halves of a U-Net around a transformer, as patches and back.

Down blocks make hidden states of pictures of latents, up blocks predictions of
hidden states; the transformer stands where a U-Net has its middle. The noise level
enters both, and what the down blocks saw is an input of the up blocks: LMFusion
(arXiv 2412.15188), Eq. 6 and 14; Transfusion (arXiv 2408.11039), §3.2, whose blocks
normalise by a plain LayerNorm of each position's channels. The blocks are DDPM's
(arXiv 2006.11239, appendix B). No bias but the norms': each convolution's
output meets one there, or in the embedding of the noise level.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionlab.errors import UserError
from fusionlab.nn.functional.norms import layer_norm
from fusionlab.nn.functional.patches import (
  patchify,
  time_embedding,
  unpatchify,
)
from fusionlab.nn.parameters import fan_in
from fusionlab.nn.patches import TIME_FEATURES, weight
from fusionlab.sharding import axes

_EPS = 1e-5

# What the down blocks saw, one array per block, in their order.
Skips = tuple[Float[Array, "N _ _ _"], ...]


class UNetPatches(nn.Module):
  """Pictures of latents to hidden states and back, by convolutions.

  A stage is `blocks` residual blocks at one size; between two stages the picture
  halves and the channels double, so that after log2(patch) halvings a position is
  a patch. The up blocks mirror them, and each takes the output of its mirror image
  concatenated to its input. `enter` and `leave` read the same parameters, and
  either declares them all. The last convolution starts at zero, for the reason
  that `fusionlab.nn.patches.LinearPatches` has.

  Attributes:
    dim: width d of the hidden states.
    side: latents S along a side of the picture.
    patch: latents k along a side of a patch, a power of two that divides `side`.
    latent_channels: values c of a latent.
    channels: width of the first stage.
    blocks: residual blocks of a stage, on either way, from 1.
  """

  dim: int
  side: int
  patch: int
  latent_channels: int
  channels: int
  blocks: int

  def __post_init__(self) -> None:
    powers = [2**i for i in range(max(self.side, 1).bit_length())]
    allowed = [k for k in powers if self.side % k == 0]
    if self.patch not in allowed:
      raise UserError(
        f"patches of {self.patch} x {self.patch} latents: a U-Net halves a"
        f" picture of {self.side} x {self.side} until a position is a patch;"
        f" allowed: {', '.join(map(str, allowed))}"
      )
    if self.blocks < 1:
      raise UserError(
        f"a U-Net of {self.blocks} blocks per stage; allowed: from 1"
      )
    super().__post_init__()

  @property
  def _widths(self) -> tuple[int, ...]:
    """Channels of each stage, the finest first."""
    return tuple(self.channels << i for i in range(self.patch.bit_length()))

  def setup(self) -> None:
    """Declares the parameters of both ways."""
    weights: dict[str, jax.Array] = {}
    d, widths, time = self.dim, self._widths, 4 * self.channels
    last, ch = widths[-1], axes.CHANNELS

    def matrix(name: str, size: tuple[int, int], names=(ch, ch)) -> None:
      weights[name] = weight(self, name, size, names, fan_in(size[0]))

    def convolution(name: str, inward: int, outward: int, init: Any = None):
      shape, names = (3, 3, inward, outward), (axes.KERNEL, axes.KERNEL, ch, ch)
      init = init or fan_in(9 * inward)
      weights[name] = weight(self, name, shape, names, init)

    def norm(name: str, width: int) -> None:
      for part, init in (
        ("scale", nn.initializers.ones),
        ("bias", nn.initializers.zeros),
      ):
        full = f"{name}_{part}"
        weights[full] = weight(self, full, (width,), (axes.NORM,), init)

    def block(name: str, inward: int, width: int) -> None:
      norm(f"{name}_norm1", inward)
      convolution(f"{name}_w1", inward, width)
      matrix(f"{name}_time", (time, width))
      norm(f"{name}_norm2", width)
      # All blocks of one way add about as much as the first of them got.
      scale = (len(widths) * self.blocks) ** -0.5
      convolution(f"{name}_w2", width, width, fan_in(9 * width, scale))
      if inward != width:
        matrix(f"{name}_skip", (inward, width))

    matrix("time_w1", (TIME_FEATURES, time))
    matrix("time_w2", (time, time))
    convolution("conv_in", self.latent_channels, self.channels)
    matrix("w_in", (last, d), (ch, axes.EMBED))
    matrix("w_out", (d, last), (axes.EMBED, ch))
    for i, width in enumerate(widths):
      for b in range(self.blocks):
        block(f"down_{i}_{b}", width, width)
        block(f"up_{i}_{b}", 2 * width, width)
      if width != last:
        convolution(f"shrink_{i}", width, 2 * width)
        convolution(f"grow_{i}", 2 * width, width)
    norm("norm_out", self.channels)
    zeros = nn.initializers.zeros
    convolution("conv_out", self.channels, self.latent_channels, zeros)
    self.weights = weights

  def enter(
    self, latents: Float[Array, "N n C"], time: Float[Array, " N"]
  ) -> tuple[Float[Array, "N n d"], Skips]:
    """Noisy patches of whole pictures to hidden states.

    Args:
      latents: in raster order, in the dtype to compute in.
      time: noise level of each picture, 0..1, float32.

    Returns:
      Hidden states in the dtype of the patches, and what `leave` needs beside
      them.
    """
    embedding = self._embedding(time, latents.dtype)
    x = _convolve(unpatchify(latents, self.patch), self.weights["conv_in"])
    skips = []
    for i, width in enumerate(self._widths):
      for b in range(self.blocks):
        x = self._block(x, embedding, f"down_{i}_{b}")
        skips.append(x)
      if width != self._widths[-1]:
        x = _convolve(x, self.weights[f"shrink_{i}"], stride=2)
    x = x.reshape(*latents.shape[:2], x.shape[-1])
    return x @ self.weights["w_in"].astype(x.dtype), tuple(skips)

  def leave(
    self,
    hidden: Float[Array, "N n d"],
    skips: Skips,
    time: Float[Array, " N"],
  ) -> Float[Array, "N n C"]:
    """Hidden states after the final norm to predictions, float32.

    Args:
      hidden: of whole pictures, in the dtype to compute in.
      skips: of `enter`.
      time: what `enter` got.
    """
    embedding = self._embedding(time, hidden.dtype)
    along = self.side // self.patch
    x = hidden @ self.weights["w_out"].astype(hidden.dtype)
    x = x.reshape(hidden.shape[0], along, along, -1)
    left = list(skips)
    for i in reversed(range(len(self._widths))):
      for b in reversed(range(self.blocks)):
        x = jnp.concatenate([x, left.pop()], axis=-1)
        x = self._block(x, embedding, f"up_{i}_{b}")
      if i:
        x = _convolve(_double(x), self.weights[f"grow_{i - 1}"])
    x = self._activate(x, "norm_out").astype(jnp.float32)
    return patchify(_convolve(x, self.weights["conv_out"]), self.patch)

  def _embedding(self, time: jax.Array, dtype: Any) -> jax.Array:
    """[N, 1, 1, e], activated: each block has its own matrix for it."""
    w1, w2 = (self.weights[f"time_w{i}"].astype(dtype) for i in (1, 2))
    return jax.nn.silu(time_embedding(time, w1, w2))[:, None, None]

  def _activate(self, x: jax.Array, name: str) -> jax.Array:
    scale, bias = (self.weights[f"{name}_{part}"] for part in ("scale", "bias"))
    return jax.nn.silu(layer_norm(x, scale, bias, eps=_EPS))

  def _block(self, x: jax.Array, embedding: jax.Array, name: str) -> jax.Array:
    w = self.weights
    h = _convolve(self._activate(x, f"{name}_norm1"), w[f"{name}_w1"])
    h = h + embedding @ w[f"{name}_time"].astype(x.dtype)
    h = _convolve(self._activate(h, f"{name}_norm2"), w[f"{name}_w2"])
    if f"{name}_skip" in w:
      x = x @ w[f"{name}_skip"].astype(x.dtype)
    return x + h

  @property
  def flops_per_picture(self) -> int:
    """FLOPs of a picture's forward pass, both ways; a multiply-add is two.

    Products with what lies outside of the picture count nothing, and the
    embedding of the noise level counts once: one program computes it once.
    """
    widths, time, side = self._widths, 4 * self.channels, self.side
    c, last = self.latent_channels, widths[-1]
    pairs = (3 * side - 2) ** 2 * 2 * c * self.channels
    pairs += time * (TIME_FEATURES + time)
    pairs += 2 * (side // self.patch) ** 2 * last * self.dim
    for width in widths:
      taps = (3 * side - 2) ** 2
      # Down: two convolutions; up: two, the first and the shortcut of twice the
      # channels.
      block = (2 + 3) * taps * width**2 + side**2 * 2 * width**2
      pairs += self.blocks * (block + 2 * time * width)
      if width != last:
        shrink, grow = (3 * side // 2 - 1) ** 2, taps
        pairs += (shrink + grow) * 2 * width**2
        side //= 2
    return 2 * pairs


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """A 3 × 3 convolution of [N, H, W, C], in the dtype of `x`."""
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    window_strides=(stride, stride),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _double(x: jax.Array) -> jax.Array:
  """Each position of [N, H, W, C] becomes a square of two by two."""
  n, height, width, channels = x.shape
  x = jnp.broadcast_to(
    x[:, :, None, :, None], (n, height, 2, width, 2, channels)
  )
  return x.reshape(n, 2 * height, 2 * width, channels)
