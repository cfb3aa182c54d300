"""Checkpoints: Orbax's arrays, in a self-contained, versioned, checked folder.

`<workdir>/checkpoints/<step>/` holds `params/`, `optimizer/` and perhaps `ema/`
(Orbax), `tokenizers/`, `meta.json`, and `checksums.json`, which is written last
and removed first: a folder without it was interrupted and is never believed.
Orbax itself restores a flipped bit silently, hence the SHA-256 of every file.
This is the only file that knows Orbax.
"""

import dataclasses
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fusionlab.config import to_mapping
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.processes import from_first
from fusionlab.tokenizers import Tokenizers
from fusionlab.train.environment import package_versions
from fusionlab.train.integrity import (
  FORMAT,
  META,
  SUMS,
  checksums,
  find,
  newest,
  read_meta,
  steps_in,
)
from fusionlab.train.optimizer import named_leaves
from fusionlab.train.state import TrainState
from fusionlab.train.writers import whole_folder, write_atomic

__all__ = [
  "Checkpoints",
  "Loaded",
  "find",
  "load",
  "load_scored",
  "look",
  "newest",
  "read_meta",
  "restore_state",
  "save_model",
  "steps_in",
]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What one checkpoint holds, without optimizer state.

  Attributes:
    experiment: the resolved configuration of the run.
    tokenizers: as they were when the run started.
    params: nested dict of arrays, as trained.
    ema: their moving average, or None.
    step: optimizer steps taken.
    meta: everything `meta.json` says.
    folder: where it lies.
  """

  experiment: Experiment
  tokenizers: Tokenizers
  params: PyTree
  ema: PyTree | None
  step: int
  meta: Mapping[str, Any]
  folder: Path

  @property
  def scored(self) -> PyTree:
    """What evaluation takes: the moving average where the run kept one."""
    return self.params if self.ema is None else self.ema


def load(path: str | Path) -> Loaded:
  """Loads parameters, configuration and tokenizers, on the default device.

  Args:
    path: see `find`.

  Raises:
    UserError: see `find` and `read_meta`.
  """
  found = look(path)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def restored(folder: str, abstract: PyTree) -> PyTree:
    placed = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=device
      ),
      abstract,
    )
    return _restore(found.folder / folder, placed)

  return dataclasses.replace(
    found,
    params=restored("params", found.params),
    ema=None if found.ema is None else restored("ema", found.ema),
  )


def load_scored(found: Loaded, shardings: PyTree) -> PyTree:
  """Loads `found.scored`, each process and device only its own part.

  Args:
    found: see `look`.
    shardings: of the parameters.
  """
  placed = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    found.scored,
    shardings,
  )
  return _restore(
    found.folder / ("params" if found.ema is None else "ema"), placed
  )


def look(path: str | Path) -> Loaded:
  """Reads everything but the arrays, in whose place stand their shapes.

  Args:
    path: see `find`; of several processes the first one looks.

  Raises:
    UserError: see `find` and `read_meta`.
  """
  folder = Path(from_first(lambda: str(find(path))))
  meta = read_meta(folder)
  abstract: dict[str, Any] = {}
  for name, leaf in meta["parameters"].items():
    *parents, last = name.split("/")
    node = abstract
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jax.ShapeDtypeStruct(
      tuple(leaf["shape"]), np.dtype(leaf["dtype"])
    )
  return Loaded(
    experiment=Experiment.from_mapping(meta["config"]),
    tokenizers=Tokenizers.from_folder(folder / "tokenizers"),
    params=abstract,
    ema=abstract if meta["ema"] else None,
    step=meta["step"],
    meta=meta,
    folder=folder,
  )


def load_model(path: str | Path) -> tuple[Any, PyTree, Tokenizers]:
  """Loads a trained model: `model, params, tokenizers`.

  The parameters are the moving average where the run kept one, as evaluation
  takes them.

  Args:
    path: a workdir, its checkpoints folder, or one step's folder.

  Raises:
    UserError: see `load`.
  """
  loaded = load(path)
  model = build_model(
    loaded.experiment.model,
    loaded.tokenizers.vocabulary,
    loaded.experiment.data.row_length,
  )
  return model, loaded.scored, loaded.tokenizers


def save_model(
  folder: Path,
  experiment: Experiment,
  params: PyTree,
  tokenizers: Tokenizers,
) -> None:
  """Writes parameters that were not trained here, as `load` reads them.

  The folder is whole or not there. It holds a checkpoint of step 0 without
  optimizer state and no run: training starts from it by
  `config.init.checkpoint`.

  Args:
    folder: new or empty.
    experiment: whose model the parameters are of.
    params: nested dict of float32 arrays.
    tokenizers: copied into the folder.

  Raises:
    UserError: the folder cannot be written.
  """
  with whole_folder(folder) as partial:
    path = partial / "checkpoints" / "0"
    (path / "tokenizers").mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((path / "params").absolute(), params)
    tokenizers.save(path / "tokenizers")
    _sign(path, _meta(experiment, tokenizers, step=0, params=params))


def restore_state(path: Path, abstract: TrainState) -> TrainState:
  """Restores a whole training state, each process its own shards.

  Args:
    path: one verified step's folder.
    abstract: shapes, dtypes and shardings of the state.

  Raises:
    UserError: parameters of another path, shape or dtype.
  """
  recorded = read_meta(path)["parameters"]
  wanted = _describe(abstract.params)
  differ = sorted(
    name
    for name in recorded.keys() | wanted.keys()
    if recorded.get(name) != wanted.get(name)
  )
  if differ:
    raise UserError(
      f"{path} holds other parameters than this model: {len(differ)} differ,"
      f" first {differ[0]} ({recorded.get(differ[0])} there,"
      f" {wanted.get(differ[0])} here); resume with the fusionlab that wrote it"
    )
  rest = _restore(path / "optimizer", _rest(abstract))
  ema = None
  if abstract.ema is not None:
    ema = _restore(path / "ema", abstract.ema)
  return TrainState(
    params=_restore(path / "params", abstract.params), ema=ema, **rest
  )


class _Manager(ocp.CheckpointManager):
  """Orbax's, without its look at signals."""

  def reached_preemption(self, step: int) -> bool:
    """Never: the loop asks, and jax's count of its looks bears no other's."""
    del step
    return False


class Checkpoints:
  """Saves states in the background and keeps the newest few.

  A thread waits for Orbax's commit and then signs the folder. What went wrong
  there is raised by the next `save` or by `wait`.
  """

  def __init__(
    self,
    folder: Path,
    experiment: Experiment,
    tokenizers: Tokenizers,
    *,
    sources: Mapping[str, str],
    group_rows: int,
    keep: int,
  ):
    """Opens the folder, removing what an earlier process left incomplete.

    Args:
      folder: `<workdir>/checkpoints`, made if need be.
      experiment: the resolved configuration.
      tokenizers: copied into every checkpoint.
      sources: fingerprint of each source of data.
      group_rows: rows of a group, as resolved.
      keep: complete checkpoints kept.
    """
    self.folder = folder
    self.keep = keep
    self._experiment = experiment
    self._tokenizers = tokenizers
    self._sources = dict(sources)
    self._group_rows = group_rows
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    from_first(lambda: _clear(folder))
    # Named, processes wait for each other in the coordination service; Orbax
    # would else use the devices, from a thread, in the midst of the steps.
    several = jax.process_count() > 1
    everyone = set(range(jax.process_count())) if several else None
    self._manager = _Manager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          active_processes=everyone
        ),
      ),
    )

  def save(self, state: TrainState) -> None:
    """Copies the state from the devices and writes it in the background.

    Args:
      state: may be donated as soon as this returns.

    Raises:
      UserError: an earlier save could not be written.
    """
    self.wait()
    step = int(jax.device_get(state.step))
    items = {
      "params": ocp.args.StandardSave(state.params),
      "optimizer": ocp.args.StandardSave(_rest(state)),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    meta = _meta(
      self._experiment,
      self._tokenizers,
      step=step,
      params=state.params,
      ema=state.ema is not None,
      group_rows=self._group_rows,
      sources=self._sources,
    )
    self._manager.save(step, args=ocp.args.Composite(**items))
    self._thread = threading.Thread(
      target=self._finish, args=(step, meta), name=f"sign-checkpoint-{step}"
    )
    self._thread.start()

  def wait(self) -> None:
    """Waits until the last save is signed.

    Raises:
      UserError: it could not be written (a full disk, lost permissions).
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise UserError(
        f"cannot write a checkpoint into {self.folder}: {error}; the ones"
        f" before it are whole, resume when there is room"
      ) from error

  def close(self) -> None:
    """Waits, and closes Orbax's threads whatever happened."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _finish(self, step: int, meta: dict[str, Any]) -> None:
    try:
      # Orbax gives the folder its name when every process has written.
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        path = self.folder / str(step)
        (path / "tokenizers").mkdir()
        self._tokenizers.save(path / "tokenizers")
        _sign(path, meta)
        for old in steps_in(self.folder)[: -self.keep]:
          remove(self.folder / str(old))
    except BaseException as error:  # handed to the main thread by wait()
      self._error = error


def remove(path: Path) -> None:
  """Deletes one step's folder; it is not believed from the first moment on."""
  (path / SUMS).unlink(missing_ok=True)
  shutil.rmtree(path)


def _clear(folder: Path) -> None:
  """Makes the folder of checkpoints and removes what was interrupted."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in folder.iterdir():
    interrupted = path.name.isdigit() and not (path / SUMS).exists()
    if interrupted or ".orbax-checkpoint-tmp" in path.name:
      shutil.rmtree(path)


def _meta(
  experiment: Experiment,
  tokenizers: Tokenizers,
  *,
  step: int,
  params: PyTree,
  ema: bool = False,
  group_rows: int = 0,
  sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  vocabulary = tokenizers.vocabulary
  return {
    "format": FORMAT,
    "step": step,
    "seed": experiment.train.seed,
    "group_rows": group_rows,
    "ema": ema,
    "config": to_mapping(experiment),
    "vocabulary": {
      name: [vocabulary.offset(k), vocabulary.ends[k]]
      for k, name in enumerate(vocabulary.modalities)
    },
    "tokenizers": tokenizers.hash,
    "sources": dict(sources or {}),
    "packages": package_versions(),
    "parameters": _describe(params),
  }


def _sign(path: Path, meta: Mapping[str, Any]) -> None:
  """Writes what makes a folder believed: the meta, then the checksums."""
  write_atomic(path / META, json.dumps(meta, indent=1))
  write_atomic(path / SUMS, json.dumps({"sha256": checksums(path)}, indent=1))


def _rest(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "skipped": state.skipped,
    "opt_state": state.opt_state,
  }


def _restore(path: Path, abstract: PyTree) -> PyTree:
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path.absolute(), abstract)


def _describe(params: PyTree) -> dict[str, dict[str, Any]]:
  return {
    name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    for name, leaf in named_leaves(params).items()
  }
