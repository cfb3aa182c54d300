"""SwiGLU feed-forward, per tower where `ffn` is untied."""

import flax.linen as nn
import jax

from fusionlab.nn.parameters import Weight, cast, declare, fan_in
from fusionlab.routing import Routed, Router
from fusionlab.sharding import axes
from fusionlab.towers import Towers


def swiglu_width(dim: int) -> int:
  """The Llama rule F = 256·⌈⌊8d/3⌋/256⌉ (Chameleon's and MoT's sizes)."""
  return 256 * -(-(8 * dim // 3) // 256)


class FeedForward(nn.Module):
  """w_out(silu(x w_gate) · x w_in) (Shazeer 2020, Eq. 6), without biases.

  Attributes:
    towers: which leaves there are.
    dim: width d of the stream.
    width: hidden width F.
    out_scale: factor on the output projection's initial deviation.
  """

  towers: Towers
  dim: int
  width: int
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, stream: Routed, router: Router) -> Routed:
    """Maps [..., d] to [..., d], each token by its tower."""
    d, f = self.dim, self.width
    inward = Weight((d, f), (axes.EMBED, axes.FFN), fan_in(d), "ffn")
    w = declare(
      self.towers,
      {
        "w_gate": inward,
        "w_in": inward,
        "w_out": Weight(
          (f, d), (axes.FFN, axes.EMBED), fan_in(f, self.out_scale), "ffn"
        ),
      },
    )
    dtype = stream[0].dtype
    gate = router.linear(stream, cast(w["w_gate"], dtype))
    up = router.linear(stream, cast(w["w_in"], dtype))
    hidden = tuple(jax.nn.silu(g) * u for g, u in zip(gate, up, strict=True))
    return router.linear(hidden, cast(w["w_out"], dtype))
