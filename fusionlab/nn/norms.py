"""RMSNorm, per tower where its name is untied."""

import functools

import flax.linen as nn

from fusionlab.nn.functional.norms import rms_norm
from fusionlab.nn.parameters import Weight, declare
from fusionlab.routing import Routed, Router
from fusionlab.sharding import axes
from fusionlab.towers import Towers


class RMSNorm(nn.Module):
  """RMSNorm of a routed stream.

  Attributes:
    towers: which leaves there are.
    dim: width of the stream.
    untie: name of this norm in `config.model.untie`.
    eps: added to the mean square.
  """

  towers: Towers
  dim: int
  untie: str
  eps: float

  @nn.compact
  def __call__(self, stream: Routed, router: Router) -> Routed:
    """Normalises each token by its tower's scale; shapes and dtypes stay."""
    weights = declare(
      self.towers,
      {
        "scale": Weight(
          (self.dim,), (axes.NORM,), nn.initializers.ones, self.untie
        )
      },
    )
    norm = functools.partial(rms_norm, eps=self.eps)
    return router.apply(norm, stream, weights["scale"])
