"""A mapping becomes frozen, validated dataclasses, and goes back to a mapping.

`configs/*.py` return an `ml_collections.ConfigDict`; the library sees only the
dataclasses made here. Every room owns the dataclass of its own settings
(`models`, `data`, `train`, …); `fusionlab.experiment` puts them together.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from fusionlab.errors import ConfigError, nearest

C = TypeVar("C")


def option(
  default: Any,
  help: str,
  *,
  choices: tuple[Any, ...] | None = None,
  minimum: float | None = None,
  maximum: float | None = None,
  kind_of: Callable[[str], type] | None = None,
) -> Any:
  """Declares one setting of a config dataclass.

  Args:
    default: the value, or a callable without arguments that makes it.
    help: one sentence that says what it is, with its unit.
    choices: the values allowed, where they are few.
    minimum: the smallest value allowed.
    maximum: the largest value allowed.
    kind_of: for a nested section whose class depends on its own `kind` key:
      the function from that key's value to the dataclass.

  Returns:
    A `dataclasses.field`.
  """
  metadata = {
    "help": help,
    "choices": choices,
    "minimum": minimum,
    "maximum": maximum,
    "kind_of": kind_of,
  }
  if callable(default):
    return dataclasses.field(default_factory=default, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def from_mapping(cls: type[C], mapping: Any, path: str = "config") -> C:
  """Builds the dataclass `cls` from nested mappings, strictly.

  Args:
    cls: a dataclass whose fields are declared by `option`.
    mapping: keys are field names; nested mappings become nested dataclasses.
    path: the dotted name of `mapping`, for messages.

  Returns:
    An instance of `cls`; a field that `mapping` lacks keeps its default.

  Raises:
    ConfigError: an unknown key (with the nearest names), a wrong type, or a
      value out of range. A section may add rules of its own by a method
      `check(path)` that raises ConfigError.
  """
  if not isinstance(mapping, Mapping):
    raise ConfigError(
      f"{path} must be a section of keys, not {mapping!r}; set a key of it,"
      f" e.g. {path}.{dataclasses.fields(cast(Any, cls))[0].name}"
    )
  fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
  hints = typing.get_type_hints(cls)
  values = {}
  for key, value in mapping.items():
    if key not in fields:
      raise ConfigError(f"unknown key {path}.{key}{nearest(str(key), fields)}")
    where = f"{path}.{key}"
    values[key] = _value(hints[key], fields[key].metadata, value, where)
  built = cls(**values)
  check = getattr(built, "check", None)
  if check is not None:
    check(path)
  return built


def to_mapping(config: Any) -> dict[str, Any]:
  """Returns the nested plain mapping of a config dataclass (JSON-ready)."""
  mapping = {}
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    if dataclasses.is_dataclass(value):
      value = to_mapping(value)
    elif isinstance(value, Mapping):
      value = {
        k: to_mapping(v) if dataclasses.is_dataclass(v) else v
        for k, v in value.items()
      }
    mapping[f.name] = value
  return mapping


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"section.key": value}; tuples become lists, as JSON has them."""
  flat = {}
  for key, value in mapping.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{name}."))
    else:
      flat[name] = list(value) if isinstance(value, tuple) else value
  return flat


def _value(hint: Any, metadata: Mapping[str, Any], value: Any, where: str):
  kind_of = metadata.get("kind_of")
  if kind_of is not None:
    if not isinstance(value, Mapping) or "kind" not in value:
      raise ConfigError(f"{where} must be a section with a key 'kind'")
    kind = _scalar(str, {}, value["kind"], f"{where}.kind")
    return from_mapping(kind_of(kind), value, where)
  if dataclasses.is_dataclass(hint):
    return from_mapping(typing.cast(type, hint), value, where)
  origin = typing.get_origin(hint)
  if origin in (dict, Mapping, types.MappingProxyType) or hint is dict:
    if not isinstance(value, Mapping):
      raise ConfigError(f"{where} must be sections keyed by name")
    _, item = typing.get_args(hint)
    return {k: _value(item, {}, v, f"{where}.{k}") for k, v in value.items()}
  if origin is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
      raise ConfigError(
        f"{where}={value!r} must be a sequence of {item.__name__}"
      )
    if item is str:
      # A command line gives `a,b` as one string.
      value = [
        part.strip() if isinstance(part, str) else part
        for v in value
        for part in (v.split(",") if isinstance(v, str) else (v,))
      ]
    return tuple(_scalar(item, metadata, v, where) for v in value)
  return _scalar(hint, metadata, value, where)


def _scalar(hint: type, metadata: Mapping[str, Any], value: Any, where: str):
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if type(value) is not hint:
    raise ConfigError(
      f"{where}={value!r} is a {type(value).__name__};"
      f" it must be a {hint.__name__}"
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{where}={value!r} must be a finite number")
  choices = metadata.get("choices")
  if choices is not None and value not in choices:
    hint_text = nearest(str(value), map(str, choices))
    raise ConfigError(f"{where}={value!r} is not a choice{hint_text}")
  low, high = metadata.get("minimum"), metadata.get("maximum")
  if (low is not None and not value >= low) or (
    high is not None and not value <= high
  ):
    bounds = " and ".join(
      text
      for text, bound in ((f"at least {low}", low), (f"at most {high}", high))
      if bound is not None
    )
    raise ConfigError(f"{where}={value!r} is out of range: it must be {bounds}")
  return value
