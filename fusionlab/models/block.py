"""One layer of the decoder, with or without towers."""

import functools

import flax.linen as nn
import flax.struct

from fusionlab.models.config import TransformerConfig
from fusionlab.nn.attention import Attention, Visibility
from fusionlab.nn.feed_forward import FeedForward
from fusionlab.nn.norms import RMSNorm
from fusionlab.routing import Routed, Router
from fusionlab.towers import Towers


@flax.struct.dataclass
class Context:
  """Constants of the scan over layers."""

  router: Router
  visibility: Visibility


class Block(nn.Module):
  """One layer; h = x + Attn, y = h + FFN, normed before or on the output.

  Swin placement: h = x + norm(Attn(x)) (MoT Algorithm 1; Chameleon-34B); pre:
  h = x + Attn(norm(x)) (Llama; Chameleon-7B).
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, stream: Routed, context: Context, *, train: bool
  ) -> Routed:
    """Maps the stream `[..., d]`; dropout acts where `train`."""
    c, router = self.config, context.router
    towers = c.routed_towers
    # Depth scaling keeps the variance of a pre-norm residual stream; Swin norms
    # set each sub-layer's output to unit scale whatever its weights.
    out_scale = (2 * c.num_layers) ** -0.5 if c.norm_placement == "pre" else 1.0
    mixer = functools.partial(
      Attention(
        towers,
        c.dim,
        c.num_heads,
        c.kv_heads,
        c.width_of_head,
        c.qk_norm,
        c.norm_eps,
        out_scale,
        c.attention,
        c.causal,
        name="attention",
      ),
      router=router,
      visibility=context.visibility,
    )
    ffn = functools.partial(
      FeedForward(towers, c.dim, c.width_of_ffn, out_scale, name="ffn"),
      router=router,
    )
    dropout = nn.Dropout(c.dropout, deterministic=not train)
    stays = stays_routed(towers)
    for name, sublayer, routes in (
      ("mixer_norm", mixer, _mixer_routes(towers)),
      ("ffn_norm", ffn, _ffn_routes(towers)),
    ):
      norm = RMSNorm(towers, c.dim, name, c.norm_eps, name=name)
      moves = routes and not stays
      x = router.enter(stream) if moves else stream
      if c.norm_placement == "pre":
        x = sublayer(norm(x, router))
      else:
        x = norm(sublayer(x), router)
      x = tuple(dropout(a) for a in x)
      if moves:
        x = router.leave(x)
      stream = tuple(a + b for a, b in zip(stream, x, strict=True))
    return stream


def _mixer_routes(towers: Towers) -> bool:
  return towers.routes("q", "k", "v", "o", "qk_norm", "mixer_norm")


def _ffn_routes(towers: Towers) -> bool:
  return towers.routes("ffn", "ffn_norm")


def stays_routed(towers: Towers) -> bool:
  """Whether the residual stream is kept per tower.

  It is where both sub-layers route; where one does (`ffn` alone), the stream
  keeps sequence order and only that sub-layer's input and output move.
  """
  return _mixer_routes(towers) and _ffn_routes(towers)
