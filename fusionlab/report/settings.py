"""Configurations against defaults, and against each other."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.config import flatten, to_mapping
from fusionlab.experiment import Experiment

ABSENT = "–"


def differences(experiment: Experiment) -> list[tuple[str, str, str]]:
  """Keys whose values are not the defaults of the same kinds.

  Args:
    experiment: as recorded.

  Returns:
    (key, this run's value, default), both as JSON.
  """
  return [
    (key, ours, default)
    for key, (ours, default) in compared(
      [to_mapping(experiment), to_mapping(_default(experiment))]
    )
  ]


def compared(
  configs: Sequence[Mapping[str, Any]],
) -> list[tuple[str, tuple[str, ...]]]:
  """Keys that not all configurations have, or not with one value.

  Args:
    configs: nested mappings, as in config.json.

  Returns:
    (key, a value of each as JSON, '–' where one lacks the key), by key in the
    order of the first.
  """
  flat = [flatten(config) for config in configs]
  keys: dict[str, None] = {}
  for config in flat:
    keys |= dict.fromkeys(config)
  rows = [(key, tuple(_value(config, key) for config in flat)) for key in keys]
  return [(key, values) for key, values in rows if len(set(values)) > 1]


def kinds(experiment: Experiment) -> str:
  """'model mixture_of_transformers; objective …; sources …' in one line."""
  sources = experiment.data.sources
  names = [
    name if name == source.kind else f"{name} ({source.kind})"
    for name, source in sources.items()
  ]
  return (
    f"model {experiment.model.kind}; objective {experiment.objective.kind};"
    f" data {', '.join(names)}"
  )


def _value(flat: Mapping[str, Any], key: str) -> str:
  if key not in flat:
    return ABSENT
  return json.dumps(flat[key], ensure_ascii=False)


def _default(experiment: Experiment) -> Experiment:
  """The defaults of the same kinds, with sources of the same names."""
  sources = {
    name: type(source)(kind=source.kind)
    for name, source in experiment.data.sources.items()
  }
  sections: dict[str, Any] = {
    field.name: type(getattr(experiment, field.name))()
    for field in dataclasses.fields(experiment)
  }
  for name in ("model", "objective"):
    kind = getattr(experiment, name).kind
    sections[name] = dataclasses.replace(sections[name], kind=kind)
  sections["data"] = dataclasses.replace(sections["data"], sources=sources)
  return Experiment(**sections)
