"""How many parameters, where: total, active per token, per tower."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from fusionlab.batch import LatentGrid, Vocabulary
from fusionlab.models.config import TransformerConfig
from fusionlab.towers import SHARED, Towers, tower_of


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Numbers of parameters.

  Attributes:
    total: all of them.
    active: those that one token uses (its own tower's and the shared ones).
    embedding: input and output tables, in `total` and `active`.
    norms: scales and biases of all norms, in `total`.
    patches: of what brings patches of latents in and out, in `total`.
    per_tower: tower name -> parameters of its own; "shared" -> the rest.
  """

  total: int
  active: int
  embedding: int
  norms: int
  patches: int
  per_tower: dict[str, int]


def path_name(path: Any) -> str:
  """A tree path as 'layers/ffn/image/w_in'."""
  return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def count(
  config: TransformerConfig,
  vocab_size: int,
  grids: tuple[LatentGrid | None, ...] = (),
) -> ParameterCount:
  """Counts a model's parameters from their shapes.

  Args:
    config: the model's.
    vocab_size: ids V in the tables; `config.vocab_size` overrides it.
    grids: latents of continuous modalities, see `Vocabulary`.
  """
  from fusionlab.models import MODELS

  sizes = (vocab_size,) + (0,) * (len(config.modalities) - 1)
  vocabulary = Vocabulary(config.modalities, sizes, grids=grids)
  model = MODELS.load(config.kind)(config, vocabulary)
  leaves = jax.tree.leaves_with_path(model.abstract_params())
  sizes = {path_name(path): math.prod(leaf.shape) for path, leaf in leaves}
  return of_sizes(sizes, config.routed_towers)


def of_sizes(sizes: Mapping[str, int], towers: Towers) -> ParameterCount:
  """Sums numbers of parameters.

  Args:
    sizes: path -> numbers in the leaf.
    towers: of the model.
  """
  per_tower = collections.Counter(dict.fromkeys((SHARED, *towers.names), 0))
  embedding = norms = patches = 0
  for path, size in sizes.items():
    parts = path.split("/")
    per_tower[tower_of(parts, towers)] += size
    if parts[-1] in ("embed", "unembed"):
      embedding += size
    elif parts[-1].endswith(("scale", "bias")):
      norms += size
    if parts[0] == "patches":
      patches += size
  own = [n for tower, n in per_tower.items() if tower != SHARED]
  return ParameterCount(
    total=sum(per_tower.values()),
    active=per_tower[SHARED] + max(own, default=0),
    embedding=embedding,
    norms=norms,
    patches=patches,
    per_tower=dict(per_tower),
  )
