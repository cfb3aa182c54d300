"""A stack scans over a period of named blocks, with remat by policy name.

Parameters always carry a leading `layers` axis of periods, whatever the scan's
unrolling and remat, so paths and shapes depend on the architecture alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax

from fusionlab.errors import UserError
from fusionlab.routing import Routed
from fusionlab.sharding import axes

_policies = jax.checkpoint_policies
# Attention names its output and log-sum-exps, which cost a pass to make again
# (xla_blockwise and splash; tokamax and cuDNN keep theirs to themselves).
REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
  "full": None,
  "dots": _policies.save_from_both_policies(
    _policies.dots_saveable, _policies.save_only_these_names("attention")
  ),
  "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
}


class _Period(nn.Module):
  """One period: the blocks in order. A lone block's parameters have no prefix."""

  blocks: Mapping[str, Callable[..., nn.Module]]
  train: bool

  @nn.compact
  def __call__(self, stream: Routed, context: Any) -> tuple[Routed, None]:
    if len(self.blocks) == 1:
      (make,) = self.blocks.values()
      block = make()
      nn.share_scope(self, block)
      return block(stream, context, train=self.train), None
    for name, make in self.blocks.items():
      stream = make(name=name)(stream, context, train=self.train)
    return stream, None


class Stack(nn.Module):
  """`num_layers` blocks: periods of named blocks, scanned.

  Attributes:
    blocks: name -> factory of a block module, in order; one period.
    num_layers: a multiple of the period.
    remat: "none" or a name of `REMAT_POLICIES`.
    unroll: periods unrolled per scan step.
  """

  blocks: Mapping[str, Callable[..., nn.Module]]
  num_layers: int
  remat: str = "none"
  unroll: int = 1

  @nn.compact
  def __call__(self, stream: Routed, context: Any, *, train: bool) -> Routed:
    """Runs all layers.

    Args:
      stream: the carried tuple of arrays.
      context: constants of the scan (router, visibility).
      train: whether dropout acts.

    Raises:
      UserError: layers that are not a whole number of periods.
    """
    if self.num_layers % len(self.blocks):
      raise UserError(
        f"config.model.num_layers={self.num_layers} is not a multiple of the"
        f" period of {len(self.blocks)} blocks ({', '.join(self.blocks)})"
      )
    period = _Period
    if self.remat != "none":
      period = nn.remat(
        period, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
      )
    scanned = nn.scan(
      period,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=cast(Any, nn.broadcast),
      length=self.num_layers // len(self.blocks),
      unroll=self.unroll,
      metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
    stream, _ = scanned(self.blocks, train, name="layers")(stream, context)
    return stream
