"""Parameters by tower: which are trained, how fast, and with what decay.

A leaf belongs to the tower that its path names (`layers/ffn/image/w_in`), to
`shared` where it names none; a row of the tables of ids belongs to the tower of its
id's modality, in a dense model to the modality, like the patches of a picture. Frozen
parameters are not differentiated, while gradients flow through their activations:
LMFusion (arXiv 2412.15188), §3.2.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fusionlab.batch import Vocabulary
from fusionlab.errors import ConfigError
from fusionlab.sharding.axes import NORM, VOCAB
from fusionlab.towers import SHARED, Towers, parse_towers, tower_of
from fusionlab.train.config import OptimizerConfig

Path = tuple[str, ...]

# Rows of a table that are no modality's: `config.model.vocab_size` rounds up.
_REST = "rest"


@dataclasses.dataclass(frozen=True)
class Partition:
  """The tree of parameters, its tables cut by modality, in two parts.

  Attributes:
    axes: tuple of axis names of each parameter, `model.param_axes()`.
    towers: of the model.
    vocabulary: ranges of the modalities' ids.
    num_ids: rows V of the tables.
    freeze: towers that are not trained.
    frozen_dtype: what their matrices are kept in.
  """

  axes: PyTree
  towers: Towers
  vocabulary: Vocabulary
  num_ids: int
  freeze: frozenset[str] = frozenset()
  frozen_dtype: str = "float32"

  def kept(self, params: PyTree) -> PyTree:
    """Puts frozen matrices into the dtype they are kept in.

    Tables stay, whose rows may be frozen in parts, and so do norms, which compute
    in float32.

    Args:
      params: the tree of arrays.
    """
    tree: dict[str, Any] = {}
    for path, names in _walk(self.axes):
      leaf = _get(params, path)
      frozen = tower_of(path, self.towers) in self.freeze
      if frozen and not {VOCAB, NORM} & set(names):
        leaf = leaf.astype(self.frozen_dtype)
      _put(tree, path, leaf)
    return tree

  def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
    """Cuts the tables, and parts the trained leaves from the frozen ones.

    Args:
      params: the tree of arrays.

    Returns:
      Trained and frozen, nested dicts that hold every leaf once. A table
      [V, d] has become a dict of its modalities' rows.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, tower, source, rows in self._leaves():
      leaf = _get(params, source)
      if rows is not None:
        axis, start, stop = rows
        leaf = jax.lax.slice_in_dim(leaf, start, stop, axis=axis)
      _put(parts[tower in self.freeze], path, leaf)
    return parts

  def merge(self, trained: PyTree, frozen: PyTree) -> PyTree:
    """Puts together again what `split` took apart, exactly."""
    params: dict[str, Any] = {}
    tables: dict[Path, tuple[int, list[Any]]] = {}
    for path, tower, source, rows in self._leaves():
      leaf = _get(frozen if tower in self.freeze else trained, path)
      if rows is None:
        _put(params, source, leaf)
      else:
        tables.setdefault(source, (rows[0], []))[1].append(leaf)
    for source, (axis, parts) in tables.items():
      _put(params, source, jnp.concatenate(parts, axis=axis))
    return params

  @property
  def trained_axes(self) -> PyTree:
    """Axis names of the trained part."""
    trained: dict[str, Any] = {}
    for path, tower, source, _ in self._leaves():
      if tower not in self.freeze:
        _put(trained, path, _get(self.axes, source))
    return trained

  @property
  def trained_towers(self) -> PyTree:
    """Tower of each leaf of the trained part."""
    trained: dict[str, Any] = {}
    for path, tower, _, _ in self._leaves():
      if tower not in self.freeze:
        _put(trained, path, tower)
    return trained

  def _leaves(
    self,
  ) -> Iterator[tuple[Path, str, Path, tuple[int, int, int] | None]]:
    """Path in the cut tree, tower, path in the whole tree, and rows of a table.

    Rows are (axis, start, stop); None where the leaf is whole.
    """
    for source, names in _walk(self.axes):
      if VOCAB not in names:
        yield source, tower_of(source, self.towers), source, None
        continue
      axis = names.index(VOCAB)
      for k, name in enumerate(self.vocabulary.modalities):
        tower = self.towers.owners[k]
        rows = (axis, self.vocabulary.offset(k), self.vocabulary.ends[k])
        yield (*source, name), tower, source, rows
      if self.num_ids > self.vocabulary.size:
        rows = (axis, self.vocabulary.size, self.num_ids)
        yield (*source, _REST), SHARED, source, rows


def make_partition(
  config: OptimizerConfig, model: Any, vocabulary: Vocabulary
) -> Partition | None:
  """The partition that `config.optimizer` asks for.

  Args:
    config: `freeze`, `learning_rate_of` and `weight_decay_of`.
    model: its parameters, towers and number of ids.
    vocabulary: ranges of the modalities' ids.

  Returns:
    None where every parameter is trained alike: the tree then stays whole.

  Raises:
    ConfigError: nothing is left to train.
  """
  if not (config.freeze or config.learning_rate_of or config.weight_decay_of):
    return None
  towers = model.config.routed_towers
  freeze = frozenset(parse_towers(config.freeze, towers, "optimizer.freeze"))
  partition = Partition(
    model.param_axes(),
    towers,
    vocabulary,
    model.vocab_size,
    freeze,
    config.frozen_dtype,
  )
  if not jax.tree.leaves(partition.trained_towers):
    raise ConfigError(
      f"config.optimizer.freeze={config.freeze!r} freezes every parameter"
    )
  return partition


def _walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
  if not isinstance(tree, Mapping):
    yield path, tree
    return
  for key in sorted(tree):
    yield from _walk(tree[key], (*path, key))


def _get(tree: Any, path: Path) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _put(tree: dict[str, Any], path: Path, leaf: Any) -> None:
  *parents, last = path
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf
