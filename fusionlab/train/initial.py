"""Where the first parameters come from: drawn, copied, or grown from a checkpoint.

A tower that is added starts as a copy of another, so that it begins with what that
one knows: LMFusion (arXiv 2412.15188), §3.1; sparse upcycling (arXiv 2212.05055).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from fusionlab.config import to_mapping
from fusionlab.errors import ConfigError, UserError, nearest
from fusionlab.nn.parameters import fan_in
from fusionlab.sharding.axes import VOCAB
from fusionlab.tokenizers import Tokenizers
from fusionlab.towers import DRAWN, SHARED, Towers, parse_copies, tower_of
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train.config import InitConfig
from fusionlab.train.optimizer import named_leaves, path_name

# Of config.model: what may differ from a checkpoint that parameters are taken from,
# because it changes their tree (checked leaf by leaf) or only how they are computed.
_FREE = frozenset(
  {
    "kind", "modalities", "towers", "untie", "vocab_size", "dropout", "causal",
    "dispatch", "attention", "remat", "scan_unroll", "compute_dtype",
    "tie_embeddings",
  }
)  # fmt: skip


def add_tower(
  params: PyTree,
  name: str,
  *,
  init_from: str,
  num_ids: int = 0,
  key: jax.Array | None = None,
) -> dict[str, Any]:
  """Grows trained parameters by a tower; what there was stays bit for bit.

  Args:
    params: of a model with towers, which is not changed.
    name: of the new tower.
    init_from: the tower it starts as a copy of.
    num_ids: ids of a new modality: so many rows are added behind the tables.
    key: draws those rows.

  Returns:
    The parameters of the model whose `modalities` and `towers` end with the new
    one.

  Raises:
    UserError: no tower `init_from` (with the nearest), or one `name` already; or
      ids without a key.
  """
  groups = _groups(params)
  if init_from not in groups:
    raise UserError(
      f"the parameters have no tower {init_from!r} to copy"
      f"{nearest(init_from, groups)}; they have"
      f" {', '.join(sorted(groups)) or 'none'}"
    )
  if name in groups:
    raise UserError(f"the parameters have a tower {name!r} already")
  if num_ids and key is None:
    raise UserError(f"{num_ids} new rows of the tables need a key to draw them")

  def grown(node: Any) -> Any:
    if not isinstance(node, Mapping):
      return node
    copy = {k: grown(child) for k, child in node.items()}
    if init_from in copy:
      copy[name] = jax.tree.map(jnp.copy, copy[init_from])
    return copy

  tree = grown(params)
  if num_ids and key is not None:
    for index, (table, axis) in enumerate((("embed", 0), ("unembed", 1))):
      if table in tree:
        tree[table] = _longer(
          tree[table], num_ids, axis, jax.random.fold_in(key, index)
        )
  return tree


def _longer(table: Array, number: int, axis: int, key: jax.Array) -> Array:
  """The table with rows behind it, drawn as a table is."""
  dim = table.shape[1 - axis]
  shape = (number, dim) if axis == 0 else (dim, number)
  return jnp.concatenate(
    [table, fan_in(dim)(key, shape, table.dtype)], axis=axis
  )


def _groups(params: PyTree) -> set[str]:
  """Names of towers: the keys right above the leaves, below a module."""
  names = set()
  for path in named_leaves(params):
    parts = path.split("/")
    if len(parts) > 2 and parts[-2] != SHARED:
      names.add(parts[-2])
  return names


def drawing(config: InitConfig, model: Any) -> Callable[[jax.Array], PyTree]:
  """How parameters are made without a checkpoint.

  Args:
    config: `copy_towers` of it.
    model: what is trained.

  Returns:
    The function from a key to the parameters, which may be jitted. A copied tower
    changes no other draw.

  Raises:
    ConfigError: towers that are not there.
  """
  towers = model.config.routed_towers
  copies = parse_copies(config.copy_towers, towers, "init.copy_towers")
  if not copies:
    return model.init_params
  return functools.partial(_with_copies, model.init_params, towers, copies)


def grown_params(
  config: InitConfig, model: Any, tokenizers: Tokenizers, key: jax.Array
) -> PyTree:
  """The parameters of `config.checkpoint`, with towers and ids added.

  Args:
    config: `config.init`.
    model: what is trained.
    tokenizers: its ids.
    key: draws what the checkpoint does not have.

  Raises:
    UserError: a checkpoint that cannot be read or does not fit the model, with
      both sides of what differs.
    ConfigError: towers that are not there.
  """
  added = parse_copies(
    config.add_towers, model.config.routed_towers, "init.add_towers", drawn=True
  )
  loaded = checkpoints.load(config.checkpoint)
  before = loaded.experiment.model
  where = f"config.init.checkpoint={config.checkpoint!r}"
  _check_model(where, to_mapping(before), to_mapping(model.config))
  _check_tokenizers(where, loaded.tokenizers, tokenizers)
  old = loaded.params if loaded.ema is None else loaded.ema
  growth = _Growth(
    where,
    model,
    added,
    had=before.modalities,
    places=tokenizers.vocabulary.places_of(loaded.tokenizers.vocabulary),
  )
  growth.check(old)
  return growth(old, jax.jit(model.init_params)(key))


def _with_copies(
  init_params: Callable[[jax.Array], PyTree],
  towers: Towers,
  copies: Mapping[str, str],
  key: jax.Array,
) -> PyTree:
  params = init_params(key)
  leaves = named_leaves(params)

  def one(path: tuple[Any, ...], leaf: Array) -> Array:
    name = path_name(path)
    tower = tower_of(name.split("/"), towers)
    source = _renamed(name, tower, copies.get(tower, tower))
    # What only one modality has, as a picture's patches, stays as it is drawn.
    return leaves.get(source, leaf)

  return jax.tree_util.tree_map_with_path(one, params)


def _renamed(path: str, tower: str, other: str) -> str:
  """The path of another tower's leaf of the same name."""
  *parents, group, leaf = ["", *path.split("/")]
  group = other if group == tower else group
  return "/".join([*parents, group, leaf]).lstrip("/")


@dataclasses.dataclass(frozen=True)
class _Growth:
  """Takes each leaf of a model from a checkpoint's, or leaves it as drawn.

  Attributes:
    where: the checkpoint, for messages.
    model: what is grown into.
    added: new tower -> the one it copies, or 'random'.
    had: modalities of the checkpoint.
    places: new id of each old one.
  """

  where: str
  model: Any
  added: Mapping[str, str]
  had: Sequence[str]
  places: Int[np.ndarray, " V"]

  def __call__(self, old: PyTree, fresh: PyTree) -> PyTree:
    """Returns `fresh` with everything that `old` has in its place."""
    theirs = named_leaves(old)
    axes = _leaves_of_axes(self.model.param_axes())

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
      name = path_name(path)
      source = self._source(name, theirs)
      if source is None:
        return leaf
      found = theirs[source]
      if VOCAB in axes[name]:
        axis = axes[name].index(VOCAB)
        rows = jax.lax.slice_in_dim(found, 0, len(self.places), axis=axis)
        at = (slice(None),) * axis + (self.places,)
        return leaf.at[at].set(rows)
      found = found.astype(leaf.dtype)
      # Two towers may begin as one leaf, whose buffer they must not share.
      return found if source == name else jnp.copy(found)

    return jax.tree_util.tree_map_with_path(one, fresh)

  def _source(self, name: str, theirs: Mapping[str, Any]) -> str | None:
    """Path in the checkpoint of a leaf's value; None where it is drawn.

    Raises:
      UserError: the checkpoint has none.
    """
    towers = self.model.config.routed_towers
    tower = tower_of(name.split("/"), towers)
    source = self.added.get(tower, tower)
    if source == DRAWN:
      return None
    for candidate in (source, SHARED):
      path = _renamed(name, tower, candidate)
      if path in theirs:
        return path
    if self._is_new(name, tower):
      return None
    if name == "unembed" and "embed" in theirs:
      raise UserError(
        f"{self.where} has one table for input and output; set"
        f" config.model.tie_embeddings=True"
      )
    raise UserError(
      f"{self.where} has no parameter {name!r}{nearest(name, theirs)}"
    )

  def _is_new(self, name: str, tower: str) -> bool:
    """Whether only a modality that the checkpoint lacks has such a leaf."""
    config = self.model.config
    owners = zip(config.modalities, config.routed_towers.owners, strict=True)
    others = (
      _renamed(name, tower, group)
      for group in config.routed_towers.groups
      if group != tower
    )
    return any(
      owner == tower and modality not in self.had for modality, owner in owners
    ) and self._mine.isdisjoint(others)

  @functools.cached_property
  def _mine(self) -> frozenset[str]:
    """Paths of the model that is grown into."""
    return frozenset(named_leaves(self.model.abstract_params()))

  def check(self, old: PyTree) -> None:
    """Refuses what does not fit.

    Args:
      old: the checkpoint's parameters.

    Raises:
      UserError: a leaf without a source, of another shape, or left over.
      ConfigError: a tower of a new modality that is not added.
    """
    towers = self.model.config.routed_towers
    for k, modality in enumerate(self.model.config.modalities):
      tower = towers.names[towers.of_modality[k]]
      alone = towers.of_modality.count(towers.of_modality[k]) == 1
      if modality not in self.had and alone and tower not in self.added:
        raise ConfigError(
          f"{self.where} has no modality {modality!r}; say what its tower starts"
          f" as, e.g. config.init.add_towers='{tower}:{towers.names[0]}'"
        )
    theirs = named_leaves(old)
    for tower in self.added:
      if any(f"/{tower}/" in name for name in theirs):
        raise ConfigError(
          f"{self.where} has a tower {tower!r} already;"
          f" config.init.add_towers is for what it lacks"
        )
    used = set()
    fresh = self.model.abstract_params()
    axes = _leaves_of_axes(self.model.param_axes())
    for name, leaf in named_leaves(fresh).items():
      source = self._source(name, theirs)
      if source is None:
        continue
      used.add(source)
      found = list(theirs[source].shape)
      wanted = list(leaf.shape)
      if VOCAB in axes[name]:
        axis = axes[name].index(VOCAB)
        found[axis] = wanted[axis] = 0
      if found != wanted:
        raise UserError(
          f"{self.where}: {source} has the shape {list(theirs[source].shape)},"
          f" this config needs {list(leaf.shape)}; give both models one"
          f" config.model"
        )
    left = sorted(theirs.keys() - used)
    if left:
      raise UserError(
        f"{self.where} has {len(left)} parameters that this config has no place"
        f" for, first {left[0]}; keep its modalities and config.model.untie"
      )


def _leaves_of_axes(axes: PyTree) -> dict[str, tuple[str, ...]]:
  """Axis names by path of a parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(
    axes, is_leaf=lambda x: isinstance(x, tuple)
  )
  return {path_name(path): names for path, names in leaves}


def _check_model(
  where: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
  """Refuses another architecture under parameters of the same shape."""
  differ = [
    f"config.model.{key}: {old.get(key)!r} there, {new[key]!r} here"
    for key in sorted(new)
    if key not in _FREE and key in old and old[key] != new[key]
  ]
  if differ:
    raise UserError(
      f"{where} is of another architecture ({'; '.join(differ)}); take its"
      f" values"
    )


def _check_tokenizers(where: str, old: Tokenizers, new: Tokenizers) -> None:
  """Refuses ids that mean something else."""
  # Without the ids that pictures append; `places_of` looks at those.
  if old.text.tokenizer_json() != new.text.tokenizer_json():
    raise UserError(
      f"{where} was trained with another text tokenizer; point"
      f" config.data.text_tokenizer at the file in its folder tokenizers/"
    )
  if old.image and new.image and old.image.hash != new.image.hash:
    raise UserError(
      f"{where} was trained with another image tokenizer; point"
      f" config.data.image_tokenizer at the file in its folder tokenizers/"
    )
