"""A name map: published names and paths of our tree, both ways, nothing left over.

A table has one entry per kind of published tensor. In its name `{k}` stands for
the index of a modality, whose tower our leaf is, and `{l}` for that of a layer:
our leaf stacks all layers along its first axis.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusionlab.errors import UserError, nearest

Sizes = Mapping[str, int]
_Convert = Callable[[np.ndarray, Sizes], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Conversion:
  """How one tensor's elements are arranged there and here.

  Both directions only move elements, so that they map gradients too and one
  undoes the other to the bit.

  Attributes:
    to_ours: published array and sizes to our array.
    to_theirs: our array and sizes to the published one.
  """

  to_ours: _Convert
  to_theirs: _Convert


@dataclasses.dataclass(frozen=True)
class Entry:
  """One kind of published tensor.

  Attributes:
    name: published name, with `{k}` for the modality and `{l}` for the layer.
    path: our path, with `{tower}` for the tower's name.
    shape: names of the published dimensions, looked up in the sizes.
    conversion: of one modality's and one layer's tensor.
  """

  name: str
  path: str
  shape: tuple[str, ...]
  conversion: Conversion

  def below(self, prefix: str, path: str) -> "Entry":
    """The entry of a module that stands somewhere in a larger one.

    Args:
      prefix: put before the published name.
      path: put before ours.
    """
    return dataclasses.replace(
      self, name=prefix + self.name, path=path + self.path
    )


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where one published tensor goes; `layer` None where it is not stacked."""

  entry: Entry
  tower: int
  layer: int | None


def _places(
  table: Sequence[Entry], towers: int, layers: int
) -> dict[str, _Place]:
  """Every tensor that a table expects, by published name."""
  return {
    entry.name.format(k=k, l=layer): _Place(
      entry, k, layer if "{l}" in entry.name else None
    )
    for entry in table
    for k in range(towers if "{k}" in entry.name else 1)
    for layer in range(layers if "{l}" in entry.name else 1)
  }


def _anonymous(name: str) -> str:
  del name
  return ""


def from_published(
  table: Sequence[Entry],
  arrays: Mapping[str, np.ndarray],
  sizes: Sizes,
  towers: Sequence[str],
  *,
  layers: int = 0,
  partial: bool = False,
  file_of: Callable[[str], str] = _anonymous,
) -> dict[str, Any]:
  """Turns published tensors into our nested dict, one tensor at a time.

  Args:
    table: the system's entries.
    arrays: tensors by published name; each is asked for once.
    sizes: the dimensions that the entries name.
    towers: name of each modality's tower.
    layers: number of layers, where the entries have `{l}`.
    partial: leave out what the arrays lack, instead of refusing.
    file_of: the file of a tensor, for messages.

  Raises:
    UserError: a name the table does not know (with the nearest), a modality
      without a tower, a wrong shape, or a tensor that is missing.
  """
  expected = _places(table, len(towers), layers)
  for name in arrays:
    if name not in expected:
      raise UserError(
        f"{_before(file_of(name))}unknown tensor"
        f" {name!r}{nearest(name, expected)}"
      )
  missing = [name for name in expected if name not in arrays]
  if partial:
    expected = {n: p for n, p in expected.items() if n in arrays}
  elif missing:
    # What is missing is in no file, so the first one there names the place.
    where = next((file_of(name) for name in arrays), "")
    raise UserError(
      f"{_before(where)}{len(missing)} tensor(s) missing, first {missing[0]!r}"
    )
  tree: dict[str, Any] = {}
  for name, place in expected.items():
    array, entry = arrays[name], place.entry
    shape = tuple(sizes[dimension] for dimension in entry.shape)
    if array.shape != shape:
      raise UserError(
        f"{_before(file_of(name))}tensor {name!r} has shape"
        f" {list(array.shape)}; it must be {list(shape)}"
        f" ({' x '.join(entry.shape)})"
      )
    ours = entry.conversion.to_ours(array, sizes)
    *parents, leaf = entry.path.format(tower=towers[place.tower]).split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    if place.layer is None:
      node[leaf] = ours
    else:
      if leaf not in node:
        node[leaf] = np.empty((layers, *ours.shape), ours.dtype)
      node[leaf][place.layer] = ours
  return tree


def to_published(
  table: Sequence[Entry],
  tree: Mapping[str, Any],
  sizes: Sizes,
  towers: Sequence[str],
  *,
  layers: int = 0,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields published names and tensors of our nested dict, in the table's order.

  Args:
    table: the system's entries.
    tree: our parameters; where a tower has no leaf of its own, the shared one is
      taken.
    sizes: the dimensions that the entries name.
    towers: name of each modality's tower.
    layers: number of layers, where the entries have `{l}`.

  Raises:
    UserError: a leaf that the tree lacks.
  """
  for name, place in _places(table, len(towers), layers).items():
    entry = place.entry
    leaf = _leaf(tree, entry.path, towers[place.tower])
    if place.layer is not None:
      leaf = leaf[place.layer]
    theirs = entry.conversion.to_theirs(np.asarray(leaf), sizes)
    yield name, np.ascontiguousarray(theirs)


def _leaf(tree: Mapping[str, Any], path: str, tower: str) -> Any:
  for name in (tower, "shared"):
    node: Any = tree
    for part in path.format(tower=name).split("/"):
      node = node.get(part) if isinstance(node, Mapping) else None
    if node is not None:
      return node
  raise UserError(f"the parameters have no {path.format(tower=tower)!r}")


def _before(file: str) -> str:
  return f"{file}: " if file else ""


def _same(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  del sizes
  return array


def _transposed(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  del sizes
  return array.T


# The array as it is; a torch Linear's [out, in] as our [in, out].
SAME = Conversion(_same, _same)
TRANSPOSED = Conversion(_transposed, _transposed)


def into_heads(heads: str) -> Conversion:
  """A projection to heads: [H·D, d] there, [d, H, D] here.

  Args:
    heads: name of the number of heads among the sizes, "H" or "G".
  """

  def to_ours(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return array.T.reshape(array.shape[1], sizes[heads], sizes["D"])

  def to_theirs(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return array.reshape(array.shape[0], sizes[heads] * sizes["D"]).T

  return Conversion(to_ours, to_theirs)


def _from_heads(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  return array.T.reshape(sizes["H"], sizes["D"], array.shape[0])


def _to_from_heads(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  return array.reshape(sizes["H"] * sizes["D"], array.shape[-1]).T


# The projection from heads: [d, H·D] there, [H, D, d] here.
FROM_HEADS = Conversion(_from_heads, _to_from_heads)
