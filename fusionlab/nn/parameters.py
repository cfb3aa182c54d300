"""Declares named parameters, one leaf per tower; knows nothing else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from fusionlab.routing import Routed
from fusionlab.towers import Towers


@dataclasses.dataclass(frozen=True)
class Weight:
  """Shape, named axes and initialiser of one parameter.

  Attributes:
    shape: of one tower's leaf.
    axes: names of `fusionlab.sharding.axes`, one per dimension.
    init: (key, shape, dtype) -> array.
    untie: the name in `config.model.untie` that makes it per tower.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: Callable[..., jax.Array]
  untie: str


def fan_in(size: int, scale: float = 1.0) -> Callable[..., jax.Array]:
  """Truncated normal with standard deviation scale · size^(−1/2)."""
  # The factor restores the deviation that cutting at 2 sigma takes away.
  std = scale * size**-0.5 / 0.87962566103423978
  return nn.initializers.truncated_normal(std)


class _Leaf(nn.Module):
  weights: Mapping[str, Weight]

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    return {name: self._value(name, w) for name, w in self.weights.items()}

  def _value(self, name: str, weight: Weight) -> Any:
    if not self.has_variable("params", name):
      init = nn.with_partitioning(weight.init, weight.axes)
      return self.param(name, init, weight.shape, jnp.float32)
    # Flax compares shapes by tracing the initialiser, a tenth of all tracing.
    value = nn.meta.unbox(self.get_variable("params", name))
    if value.shape != weight.shape:
      raise errors.ScopeParamShapeError(
        name, "/".join(self.path), value.shape, weight.shape
      )
    return value


def declare(towers: Towers, weights: Mapping[str, Weight]) -> dict[str, Routed]:
  """Declares weights inside the calling module's compact method.

  A weight named `w_in` of the module `ffn` is the leaf `ffn/<tower>/w_in`, or
  `ffn/shared/w_in` where it is tied.

  Args:
    towers: decides which leaves there are.
    weights: by name.

  Returns:
    Per name a tuple with one array per tower, or of one shared array.
  """
  by_leaf: dict[str, dict[str, Weight]] = {}
  for name, weight in weights.items():
    for leaf in towers.leaves(weight.untie):
      by_leaf.setdefault(leaf, {})[name] = weight
  values = {leaf: _Leaf(ws, name=leaf)() for leaf, ws in by_leaf.items()}
  return {
    name: tuple(values[leaf][name] for leaf in towers.leaves(weight.untie))
    for name, weight in weights.items()
  }


def cast(weights: Routed, dtype: jnp.dtype) -> Routed:
  """The weights in the compute dtype."""
  return tuple(w.astype(dtype) for w in weights)
