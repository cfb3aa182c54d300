"""A name map: published names become paths of our tree, and nothing is left over.

A table has one entry per kind of published tensor. `{k}` in its name stands for
the index of a modality; our leaf is that modality's tower.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusionlab.errors import UserError, nearest

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One kind of published tensor.

  Attributes:
    name: published name, with `{k}` for the modality.
    path: our path, with `{tower}` for the tower's name.
    shape: names of the published dimensions, looked up in the sizes.
    convert: published array and sizes to our array; linear, so that it maps
      gradients too.
  """

  name: str
  path: str
  shape: tuple[str, ...]
  convert: Callable[[np.ndarray, Sizes], np.ndarray]

  @property
  def pattern(self) -> re.Pattern[str]:
    """Matches the published name; its group is the modality."""
    return re.compile(re.escape(self.name).replace(r"\{k\}", r"(\d+)"))


def from_published(
  table: Sequence[Entry],
  arrays: Mapping[str, np.ndarray],
  sizes: Sizes,
  towers: Sequence[str],
) -> dict[str, Any]:
  """Turns published tensors into our nested dict.

  Args:
    table: the system's entries.
    arrays: tensors by published name.
    sizes: the dimensions that the entries name.
    towers: name of each modality's tower.

  Raises:
    UserError: a name the table does not know (with the nearest), a modality
      without a tower, a wrong shape, or a tensor that is missing.
  """
  tree: dict[str, Any] = {}
  expected = {
    entry.name.format(k=k): entry for entry in table for k in range(len(towers))
  }
  for name, array in arrays.items():
    if name not in expected:
      raise UserError(f"unknown tensor {name!r}{nearest(name, expected)}")
    entry = expected[name]
    shape = tuple(sizes[dimension] for dimension in entry.shape)
    if array.shape != shape:
      raise UserError(
        f"tensor {name!r} has shape {list(array.shape)}; it must be"
        f" {list(shape)} ({' x '.join(entry.shape)})"
      )
    match = entry.pattern.fullmatch(name)
    tower = towers[int(match.group(1))] if match and match.groups() else ""
    *parents, leaf = entry.path.format(tower=tower).split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = entry.convert(array, sizes)
  missing = sorted(expected.keys() - arrays.keys())
  if missing:
    raise UserError(f"{len(missing)} tensor(s) missing, first {missing[0]!r}")
  return tree


def same(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  """The array as it is."""
  del sizes
  return array


def transposed(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  """A torch Linear's [out, in] as our [in, out]."""
  del sizes
  return array.T
