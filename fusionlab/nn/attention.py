"""Self-attention whose projections may be per tower; the mixing never is.

Source: Mixture-of-Transformers (arXiv 2411.04996), Eq. 1 and Algorithm 1:
queries, keys, values and outputs by the token's tower, one softmax over all.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.errors import UserError
from fusionlab.nn.functional.norms import layer_norm, rms_norm
from fusionlab.nn.functional.rotary import rotate
from fusionlab.nn.parameters import Weight, cast, declare, fan_in
from fusionlab.routing import Layout, Routed, Router, route
from fusionlab.sharding import axes
from fusionlab.sharding.rules import per_shard, sequence_shards, whole
from fusionlab.towers import Towers
from kernels_pallas.attention import RefusedError, attention


@flax.struct.dataclass
class Visibility:
  """What attention needs of a batch besides the stream.

  Attributes:
    k_start, k_end: keys that each query sees.
    cos, sin: of the rotary angles.
    slot: where each token's key and value are put in the cache, whose places
      `k_start` and `k_end` then count; one past the last puts it nowhere. None
      where there is no cache.
    sequence: moves a row that was dealt to context-parallel devices into the
      order of the sequence; None where it is in that order.
  """

  k_start: Int[Array, "B L"]
  k_end: Int[Array, "B L"]
  cos: Float[Array, "B L D/2"]
  sin: Float[Array, "B L D/2"]
  slot: Int[Array, "B L"] | None = None
  sequence: Layout | None = None


class Attention(nn.Module):
  """Grouped-query attention with QK-norm and rotary positions.

  Attributes:
    towers: which leaves there are.
    dim: width d of the stream.
    num_heads, num_kv_heads, head_dim: H, G and D.
    qk_norm: "none", "rms" or "layer", over D before the rotation, one weight
      for all heads (Chameleon §2.3; MoT has RMSNorm per modality).
    norm_eps: of the QK-norm.
    out_scale: factor on the output projection's initial deviation.
    implementation: of the mixing, by name.
    causal: whether the intervals are the causal documents: a token sees its
      own document up to itself.
  """

  towers: Towers
  dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  qk_norm: str
  norm_eps: float
  out_scale: float = 1.0
  implementation: str = "auto"
  causal: bool = True

  @nn.compact
  def __call__(
    self, stream: Routed, router: Router, visibility: Visibility
  ) -> Routed:
    """Mixes a stream `[..., d]` over the keys each query sees.

    With `visibility.slot` the collection "cache" holds earlier tokens' "k" and
    "v", `[B, G, S, D]`, and gets these tokens'.

    Raises:
      UserError: a named implementation that cannot do the call.
    """
    d, dh = self.dim, self.head_dim
    h, g = self.num_heads, self.num_kv_heads
    weights = {
      "q": Weight(
        (d, h, dh), (axes.EMBED, axes.HEADS, axes.HEAD_DIM), fan_in(d), "q"
      ),
      "k": Weight(
        (d, g, dh), (axes.EMBED, axes.KV_HEADS, axes.HEAD_DIM), fan_in(d), "k"
      ),
      "v": Weight(
        (d, g, dh), (axes.EMBED, axes.KV_HEADS, axes.HEAD_DIM), fan_in(d), "v"
      ),
      "o": Weight(
        (h, dh, d),
        (axes.HEADS, axes.HEAD_DIM, axes.EMBED),
        fan_in(h * dh, self.out_scale),
        "o",
      ),
    }
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    if self.qk_norm != "none":
      for name in ("q_norm", "k_norm"):
        weights[f"{name}_scale"] = Weight((dh,), (axes.NORM,), ones, "qk_norm")
        if self.qk_norm == "layer":
          weights[f"{name}_bias"] = Weight(
            (dh,), (axes.NORM,), zeros, "qk_norm"
          )
    w = declare(self.towers, weights)
    dtype = stream[0].dtype

    def project(name: str, heads: int) -> jax.Array:
      matrices = tuple(m.reshape(d, heads * dh) for m in cast(w[name], dtype))
      y = router.linear(stream, matrices)
      y = tuple(a.reshape(*a.shape[:-1], heads, dh) for a in y)
      if name != "v":
        y = self._normalise(y, router, w, f"{name}_norm")
      return router.leave(y)[0] if routed else y[0]

    routed = self.towers.routes("q", "k", "v", "o", "qk_norm", "mixer_norm")
    q = rotate(project("q", h), visibility.cos, visibility.sin)
    k = rotate(project("k", g), visibility.cos, visibility.sin)
    v = project("v", g)
    if visibility.slot is not None:
      k = self._remember("k", k, visibility.slot)
      v = self._remember("v", v, visibility.slot)
    try:
      mixed = self._mix(q, k, v, visibility)
    except RefusedError as refused:
      raise UserError(f"config.model.attention: {refused}") from refused
    mixed = mixed.reshape(*mixed.shape[:2], h * dh)
    out = router.enter((mixed,)) if routed else (mixed,)
    matrices = tuple(m.reshape(h * dh, d) for m in cast(w["o"], dtype))
    return router.linear(out, matrices)

  def _mix(
    self, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
  ) -> Float[Array, "B Q H D"]:
    """Softmax over the keys each query sees, on each device for its queries.

    Where rows lie over context-parallel devices, each gathers the keys and values
    of whole rows (as Llama 3 does: arXiv 2407.21783, section 3.3.2).
    """
    mix = functools.partial(attention, implementation=self.implementation)
    intervals = visibility.k_start, visibility.k_end
    if visibility.sequence is not None:
      row = (axes.ACT_BATCH, axes.ACT_LENGTH)

      def gathered(q, k, v, k_start, k_end, order):
        k, v = (whole(x, 1, axes.ACT_LENGTH) for x in (k, v))
        k, v = (route(x, order)[0] for x in (k, v))
        return mix(q, k, v, k_start, k_end, causal=False, documents=False)

      queries, keys = (*row, axes.HEADS), (*row, axes.KV_HEADS)
      names = (queries, keys, keys, row, row, (axes.ACT_BATCH,))
      return per_shard(gathered, names, queries)(
        q, k, v, *intervals, visibility.sequence
      )
    documents = self.causal and visibility.slot is None
    mix = functools.partial(mix, causal=documents, documents=documents)
    # Rows in order are whole on each device; one device has them anyhow.
    length = axes.ACT_LENGTH if sequence_shards() == 1 else None
    row = (axes.ACT_BATCH, length)
    queries, keys = (*row, axes.HEADS), (*row, axes.KV_HEADS)
    names = (queries, keys, keys, row, row)
    return per_shard(mix, names, queries)(q, k, v, *intervals)

  def _remember(
    self, name: str, new: jax.Array, slot: Int[Array, "B L"]
  ) -> Float[Array, "B S G D"]:
    """Puts new keys or values into the cache and returns all of them."""
    # Heads first: a step's product then reads each head's keys in one piece.
    held: Any = self.variable("cache", name, _no_cache)
    row = jnp.arange(slot.shape[0])[:, None]
    held.value = held.value.at[row, :, slot].set(
      new.astype(held.value.dtype), mode="drop"
    )
    return jnp.swapaxes(held.value, 1, 2)

  def _normalise(
    self, y: Routed, router: Router, w: dict[str, Routed], name: str
  ) -> Routed:
    if self.qk_norm == "none":
      return y
    eps = self.norm_eps
    if self.qk_norm == "rms":
      norm = functools.partial(rms_norm, eps=eps)
      return router.apply(norm, y, w[f"{name}_scale"])
    norm = functools.partial(layer_norm, eps=eps)
    return router.apply(norm, y, w[f"{name}_scale"], w[f"{name}_bias"])


def _no_cache() -> jax.Array:
  raise ValueError('attention with `slot` needs the collection "cache"')


def visibility_of(
  k_start: Int[Array, "B L"],
  k_end: Int[Array, "B L"],
  angles: Float[Array, "B L _"],
  slot: Int[Array, "B L"] | None = None,
  stored: Int[Array, "B L"] | None = None,
) -> Visibility:
  """Bundles a batch's intervals with the rotation of its positions."""
  sequence = None
  if stored is not None and sequence_shards() > 1:
    place = jnp.argsort(stored, axis=1).astype(jnp.int32)
    sequence = Layout((stored,), place)
  return Visibility(
    k_start, k_end, jnp.cos(angles), jnp.sin(angles), slot, sequence
  )
