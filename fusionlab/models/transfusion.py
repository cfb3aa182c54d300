"""Transfusion: next tokens and the noise of continuous pictures, one decoder.

Source: Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with
One Multi-Modal Model" (arXiv 2408.11039), sections 3.1 to 3.3: a picture is a span
of patches of latents, whose positions see each other whole; patches enter and leave
by a matrix or by the halves of a U-Net; everything else is a Llama. With towers it
is Mixture-of-Transformers in the Transfusion setting (arXiv 2411.04996, section
3.4), and with a frozen text tower LMFusion (arXiv 2412.15188).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fusionlab.batch import Batch, LatentGrid
from fusionlab.config import option
from fusionlab.errors import UserError
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
  Size,
)
from fusionlab.models.transformer import Cache, Decoded, Embed, Transformer
from fusionlab.nn.functional.diffusion import SAMPLERS, Process
from fusionlab.nn.patches import LinearPatches
from fusionlab.nn.unet import UNetPatches
from fusionlab.routing import Layout
from fusionlab.sharding.rules import sequence_shards


@dataclasses.dataclass(frozen=True)
class TransfusionConfig(MixtureOfTransformersConfig):
  """`config.model`; `untie=''` is the dense Transfusion of the paper."""

  kind: str = option("transfusion", "registered model or package.module:Class")
  norm_placement: str = option(
    "pre",
    "norm before the sub-layer, or on its output",
    choices=("pre", "swin"),
  )
  qk_norm: str = option(
    "none",
    "norm of queries and keys over a head",
    choices=("none", "rms", "layer"),
  )
  causal: bool = option(
    False, "whether patches see no later patch of their picture"
  )
  patches: str = option(
    "linear",
    "how patches enter and leave: by a matrix, or by a U-Net's halves",
    choices=("linear", "unet"),
  )
  unet_channels: int = option(
    32, "unet: channels at the latents' own resolution", minimum=1
  )
  unet_blocks: int = option(2, "unet: residual blocks of a stage", minimum=1)
  process: str = option(
    "ddpm",
    "ddpm: patches' predictions are their noise; flow: rectified flow, noise -"
    " data",
    choices=tuple(SAMPLERS),
  )
  num_timesteps: int = option(1000, "T, timesteps of ddpm", minimum=1)

  def forward_flops_per_token(self, vocab_size: int, row_length: int) -> float:
    """Model FLOPs of one token's forward pass; a multiply-add is two.

    As of the causal decoder: what patches see of their own picture beyond
    themselves is a small part of a row. Patches' own matrices and the U-Net are
    not counted.

    Args:
      vocab_size: ids V; `vocab_size` of the config overrides it.
      row_length: tokens L over which attention looks.
    """
    causal = dataclasses.replace(self, causal=True)
    return super(TransfusionConfig, causal).forward_flops_per_token(
      vocab_size, row_length
    )


class Transfusion(Transformer):
  """The decoder with patches of latents among its tokens.

  The vocabulary says which modality is continuous and how its latents lie.
  """

  config: TransfusionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

  Config = TransfusionConfig

  @property
  def process(self) -> Process:
    """What predictions are of, in training and where pictures are drawn."""
    return Process(self.config.process, self.config.num_timesteps)

  @property
  def image(self) -> int:
    """Id of the continuous modality.

    Raises:
      UserError: the vocabulary has none, or several.
    """
    if len(self.vocabulary.continuous) != 1:
      raise UserError(
        f"config.model.kind='transfusion' needs one continuous modality, and the"
        f" tokenizers make {len(self.vocabulary.continuous)}; set"
        f" config.data.image_tokenizer=kl"
      )
    return self.vocabulary.continuous[0]

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool = False, denoise: bool = False
  ) -> Any:
    """Hidden states after the final norm, in sequence order.

    Args:
      batch: rows of packed documents with latents; `time` says how noisy.
      train: whether dropout acts (needs the RNG stream "dropout").
      denoise: whether the prediction is returned too.

    Returns:
      `[B, L, d]`, or with `denoise` the pair of that and the prediction of each
      continuous position, float32 `[B, L, C]`, 0 elsewhere.

    Raises:
      UserError: a batch without latents, or without the layout the towers need.
    """
    inputs: Any = jax.tree.map(jnp.asarray, batch)
    if inputs.latents is None:
      raise UserError(
        "the batch has no latents; make it with the run's own tokenizers, or by"
        " fusionlab.batch_of_ids(…, latents=…)"
      )
    if inputs.stored is not None and self.config.patches == "unet":
      raise UserError(
        f"config.mesh.sequence={sequence_shards()} deals a picture's patches to"
        f" several devices, and config.model.patches='unet' needs it whole; use"
        f" patches='linear'"
      )
    patches = self._patches(name="patches")
    time = inputs.time
    if time is None:
      time = jnp.zeros(inputs.tokens.shape, jnp.float32)
    span = inputs.span
    embed, kept = self._entering(
      patches, inputs.tokens, inputs.latents, time, span
    )
    hidden = self._hidden(inputs, embed, train=train)
    if not denoise:
      return hidden
    return hidden, self._leaving(patches, hidden, kept)

  def step(
    self,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    start: Int[Array, " B"],
    fresh: Int[Array, " B"],
    layout: Layout | None = None,
    layers: Sequence[int] = (),
    latents: Float[Array, "B T C"] | None = None,
    time: Float[Array, "B T"] | None = None,
    denoise: bool = False,
  ) -> Decoded:
    """Runs some more tokens of each row; see `Transformer.step`.

    A picture's patches are run together, whole: they see each other. Run again
    from the same `start` they overwrite what the cache holds of them, and nothing
    else.

    Args:
      params: of `decoding_params`.
      tokens: ids, the new ones of each row first.
      cache: of `init_cache`, or of an earlier step.
      start: tokens of the row that the cache already holds.
      fresh: how many of `tokens` are new, 0..T; the others are padding.
      layout: of `tokens`, see `Transformer.step`.
      layers: indices of layers whose output is returned too.
      latents: values of the continuous positions; None where there are none.
      time: their noise levels; None: clean.
      denoise: whether `Decoded.prediction` is made.
    """
    options: dict[str, Any] = {
      "start": start,
      "fresh": fresh,
      "layout": layout,
      "layers": layers,
    }
    if latents is None:
      return super().step(params, tokens, cache, **options)
    if time is None:
      time = jnp.zeros(tokens.shape, jnp.float32)
    column = jnp.arange(tokens.shape[1])
    inside = self.vocabulary.modality_of(tokens) == self.image
    inside &= column < fresh[:, None]
    starts = inside & ~jnp.pad(inside, ((0, 0), (1, 0)))[:, :-1]
    span = jnp.where(inside, jnp.cumsum(starts, axis=1), 0)
    patches: Any = self._patches(parent=None)
    bound = patches.bind({"params": params["patches"]})
    embed, kept = self._entering(bound, tokens, latents, time, span)
    end = start[:, None] + column + 1
    if not self.config.causal:
      first = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)
      whole = (
        start[:, None] + first + self.vocabulary.grid(self.image).positions
      )
      end = jnp.where(inside, whole, end)
    decoded = self._decode(params, tokens, cache, embed, k_end=end, **options)
    if not denoise:
      return decoded
    prediction = self._leaving(bound, decoded.hidden, kept)
    return dataclasses.replace(decoded, prediction=prediction)

  @nn.nowrap
  def _patches(self, **options: Any) -> "_Patches":
    owner = self.config.routed_towers.owners[self.image]
    grid = self.vocabulary.grid(self.image)
    return _Patches(self.config, grid, owner, **options)

  @nn.nowrap
  def _entering(
    self,
    patches: Any,
    tokens: Int[Array, "B L"],
    latents: Float[Array, "B L C"],
    time: Float[Array, "B L"],
    span: Int[Array, "B L"],
  ) -> tuple[Embed, "_Kept"]:
    """How tokens and patches enter, and what their leaving needs."""
    inside = (span > 0)[..., None]
    latents = latents.astype(self.compute_dtype)
    kept = _Kept(inside)
    if self.config.patches == "linear":
      entered = patches.enter(latents, time)
    else:
      n = self.vocabulary.grid(self.image).positions
      kept = _Kept(inside, *_slots(span, n))
      level = kept.gather(time[..., None])[:, 0, 0]
      entered, skips = patches.enter(kept.gather(latents), level)
      entered = kept.scatter(entered)
      kept = dataclasses.replace(kept, skips=skips, time=level)
    look_up = self._lookup(tokens)

    def embed(table: jax.Array, names: Sequence[str]) -> jax.Array:
      return jnp.where(inside, entered, look_up(table, names))

    return embed, kept

  @nn.nowrap
  def _leaving(
    self, patches: Any, hidden: Float[Array, "B L d"], kept: "_Kept"
  ) -> Float[Array, "B L C"]:
    """Predictions at the continuous positions, 0 elsewhere."""
    if self.config.patches == "linear":
      predicted = patches.leave(hidden)
    else:
      predicted = patches.leave(kept.gather(hidden), kept.skips, kept.time)
      predicted = kept.scatter(predicted)
    return jnp.where(kept.inside, predicted, 0.0).astype(jnp.float32)

  def _smallest_batch(self) -> Batch:
    batch = super()._smallest_batch()
    shape = batch.tokens.shape
    latents = jnp.zeros((*shape, self.vocabulary.latent_dim), jnp.float32)
    span = jnp.zeros(shape, jnp.int32)
    return dataclasses.replace(batch, latents=latents, span=span)


class _Patches(nn.Module):
  """The patches' parameters, as those of a tower: `patches/image/…`.

  They are the picture's own whatever is untied, in a dense model too, so that
  everything else can be frozen there.
  """

  config: TransfusionConfig
  grid: LatentGrid
  owner: str

  def setup(self) -> None:
    c, grid = self.config, self.grid
    if c.patches == "linear":
      patches = LinearPatches(c.dim, grid.dim)
    else:
      patches = UNetPatches(
        c.dim,
        grid.side,
        grid.patch,
        grid.channels,
        c.unet_channels,
        c.unet_blocks,
      )
    setattr(self, self.owner, patches)

  def enter(self, *args: jax.Array) -> Any:
    """See `LinearPatches.enter` and `UNetPatches.enter`."""
    return getattr(self, self.owner).enter(*args)

  def leave(self, *args: Any) -> jax.Array:
    """See `LinearPatches.leave` and `UNetPatches.leave`."""
    return getattr(self, self.owner).leave(*args)


@dataclasses.dataclass(frozen=True)
class _Kept:
  """Where the pictures of rows are, and what their U-Net keeps on its way.

  Attributes:
    inside: bool [B, L, 1], continuous positions.
    take: int32 [B, S·n], position of each patch of the S pictures a row can have.
    place: int32 [B, L], which of those a position is.
    size: n, patches of a picture.
    skips, time: of `UNetPatches.enter`.
  """

  inside: Bool[Array, "B L 1"]
  take: Any = None
  place: Any = None
  size: int = 0
  skips: Any = ()
  time: Any = None

  def gather(self, x: Float[Array, "B L c"]) -> Float[Array, "N n c"]:
    """Rows to pictures."""
    taken = jnp.take_along_axis(x, self.take[..., None], axis=1)
    return taken.reshape(-1, self.size, x.shape[-1])

  def scatter(self, x: Float[Array, "N n c"]) -> Float[Array, "B L c"]:
    """Pictures to rows; what is no patch gets some patch's values."""
    flat = x.reshape(self.take.shape[0], -1, x.shape[-1])
    return jnp.take_along_axis(flat, self.place[..., None], axis=1)


def _slots(
  span: Int[Array, "B L"], size: int
) -> tuple[Int[Array, "B N"], Int[Array, "B L"], int]:
  """Positions of each picture's patches, and the patch of each position."""
  length = span.shape[1]
  # <boi> and <eoi> are between them; those of the first and last may be missing.
  number = max((length + 2) // (size + 2), 1)
  column = jnp.arange(length)
  each = jnp.arange(1, number + 1)[:, None]
  first = jnp.argmax(span[:, None] == each, axis=-1)
  take = first[..., None] + jnp.arange(size)
  take = jnp.minimum(take.reshape(span.shape[0], -1), length - 1)
  which = jnp.maximum(span - 1, 0)
  within = column - jnp.take_along_axis(first, which, axis=1)
  place = jnp.where(span > 0, which * size + within, 0)
  return take, place, size


# MoT's table 1 for this setting (arXiv 2411.04996), whose batch is given as GPUs x
# rows; Transfusion (arXiv 2408.11039), Table 2, names the same sizes.
SIZES = {
  "163m": Size(768, 16, 12, 4 * 128, 250_000),
  "760m": Size(1536, 24, 24, 4 * 128, 250_000),
  "1.4b": Size(2048, 24, 16, 2 * 256, 250_000),
  "7b": Size(4096, 32, 32, 2 * 256, 250_000),
}
