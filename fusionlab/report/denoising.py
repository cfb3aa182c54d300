"""What is measured of continuous pictures, told apart from codes by its name.

A run's files have `loss/image` of either. Of continuous pictures it is a squared
error, and `mse/image/t0.1`, … are its parts by noise level. Here it is `mse/image`
then, so that a page never calls it nats, nor sets it beside nats of another run.
"""

import dataclasses
import re
from collections.abc import Iterable, Set

from fusionlab.report.metrics import Metrics

_LEVEL = re.compile(r"(.+/)?mse/([^/]+)/t([^/]+)")


def denoised(names: Iterable[str]) -> frozenset[str]:
  """Modalities that are denoised, by the names of a run's metrics."""
  found = (_LEVEL.fullmatch(name) for name in names)
  return frozenset(match[2] for match in found if match)


def levels(names: Iterable[str], modality: str) -> list[str]:
  """Noise levels of a modality, as they are written, from least to greatest."""
  found = (_LEVEL.fullmatch(name) for name in names)
  written = {match[3] for match in found if match and match[2] == modality}
  return sorted(written, key=_number)


def level_of(metric: str) -> str | None:
  """'0.1' of 'mse/image/t0.1'; None of what is of no noise level."""
  match = _LEVEL.fullmatch(metric)
  return match and match[3]


def renamed(name: str, modalities: Set[str]) -> str:
  """'train/loss/image' as 'train/mse/image' where images are denoised."""
  before, slash, after = name.rpartition("loss/")
  if slash and after in modalities and (not before or before.endswith("/")):
    return f"{before}mse/{after}"
  return name


def named(metrics: Metrics) -> Metrics:
  """The same metrics with errors of denoising under their own names."""
  modalities = denoised(metrics.columns)
  return dataclasses.replace(
    metrics,
    columns={renamed(n, modalities): v for n, v in metrics.columns.items()},
  )


def _number(written: str) -> float:
  try:
    return float(written)
  except ValueError:  # of no run of ours
    return float("inf")
