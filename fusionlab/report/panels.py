"""Which curves a page shows: of one run, and of several over each other."""

import re
from collections.abc import Sequence

from fusionlab.report import denoising
from fusionlab.report.curves import Chart, Line, chart
from fusionlab.report.metrics import Metrics
from fusionlab.report.scores import (
  POOLED,
  loss_unit,
  split_name,
  split_of,
)

# Metric without prefix -> (title, unit, factor).
_REST = {
  "train/learning_rate": ("Learning rate", "learning rate", 1.0),
  "train/grad_norm": ("Gradient norm before clipping", "L2 norm", 1.0),
  "perf/tokens_per_s": ("Throughput", "tokens per second", 1.0),
  "perf/data_wait": ("Waiting for data", "% of the time", 100.0),
}
# What captions save -> unit.
_CAPTIONS = {
  "caption_nats_per_picture": "nats per picture",
  "caption_mse_gain": "mean squared error",
}
_LOSS = re.compile(r"train/(loss/.+|mse/[^/]+)")


def of_one(metrics: Metrics) -> list[Chart]:
  """Draws loss by modality and noise level, what captions save, rate, speed, ….

  Args:
    metrics: of one run; what it lacks is not drawn.
  """
  charts: list[Chart] = []

  def add(title: str, unit: str, lines: list[Line], *, log=False) -> None:
    if lines:
      name, last = f"c{len(charts)}", int(metrics.steps[-1])
      charts.append(chart(name, title, unit, lines, last_step=last, log=log))

  for metric in _scored(metrics):
    lines = []
    train = metrics.series(f"train/{metric}")
    if len(train[0]):
      lines.append(Line("train", *train))
    for style, split in enumerate(_splits(metrics)):
      series = metrics.series(_eval_name(split, metric))
      if len(series[0]):
        lines.append(Line(split_name(split).lower(), *series, style))
    add(_title(metric), _unit(metric), lines)
    if metric.startswith("mse/"):
      where, lines = _by_level(metrics, metric)
      title = f"{_title(metric)}, by noise level, {where}"
      add(title, _unit(metric), lines, log=True)
  for metric, (title, unit, factor) in _REST.items():
    steps, values = metrics.series(metric)
    if len(steps):
      add(title, unit, [Line(unit, steps, values * factor, 0)])
  return charts


def of_several(
  several: Sequence[Metrics], labels: Sequence[str]
) -> list[Chart]:
  """Draws each metric with a curve a run.

  Args:
    several: of each run.
    labels: their names.
  """
  charts: list[Chart] = []
  last = max((int(m.steps[-1]) for m in several if len(m.steps)), default=0)

  def add(name: str, title: str, unit: str, factor: float = 1.0) -> None:
    lines = []
    for style, (metrics, label) in enumerate(zip(several, labels, strict=True)):
      steps, values = metrics.series(name)
      if len(steps):
        lines.append(Line(label, steps, values * factor, style))
    if lines:
      number = len(charts)
      charts.append(chart(f"c{number}", title, unit, lines, last_step=last))

  scored = list(
    dict.fromkeys(m for metrics in several for m in _scored(metrics))
  )
  splits = list(
    dict.fromkeys(s for metrics in several for s in _splits(metrics))
  )
  for metric in scored:
    title, unit = _title(metric), _unit(metric)
    add(f"train/{metric}", f"{title}, train", unit)
    for split in splits:
      where = split_name(split).lower()
      add(_eval_name(split, metric), f"{title}, {where}", unit)
  for metric, (title, unit, factor) in _REST.items():
    add(metric, title, unit, factor)
  return charts


def _scored(metrics: Metrics) -> list[str]:
  """Losses by modality, of train and held-out, and what captions save."""
  parts = split_of(metrics.columns)
  names = {metric: None for _, metric in parts.values()}
  names |= {m[1]: None for n in metrics.columns if (m := _LOSS.fullmatch(n))}
  losses = [n for n in names if n.startswith(("loss/", "mse/"))]
  losses = [n for n in losses if denoising.level_of(n) is None]
  # Text first, as everywhere.
  losses.sort(key=lambda name: (name != "loss/text", name))
  return [*losses, *(name for name in _CAPTIONS if name in names)]


def _by_level(metrics: Metrics, metric: str) -> tuple[str, list[Line]]:
  """A curve a noise level: of what is held out, else of training."""
  modality = metric.removeprefix("mse/")
  written = denoising.levels(metrics.columns, modality)
  for prefix, where in (("eval", "held out"), ("train", "train")):
    several = [metrics.series(f"{prefix}/{metric}/t{w}") for w in written]
    lines = [
      Line(f"noise {level}", *series, style)
      for style, (level, series) in enumerate(
        zip(written, several, strict=True)
      )
      if len(series[0])
    ]
    if lines:
      return where, lines
  return "", []


def _splits(metrics: Metrics) -> list[str]:
  parts = split_of(metrics.columns)
  found = sorted({split for split, _ in parts.values()} - {POOLED})
  return [POOLED, *found]


def _eval_name(split: str, metric: str) -> str:
  return f"eval/{metric}" if split == POOLED else f"eval/{split}/{metric}"


def _title(metric: str) -> str:
  if metric in _CAPTIONS:
    return "What a caption saves of its picture's loss"
  kind, _, modality = metric.partition("/")
  name = "Denoising error" if kind == "mse" else "Loss"
  return f"{name}, {modality.replace('_', ' ')}"


def _unit(metric: str) -> str:
  return _CAPTIONS.get(metric) or loss_unit(metric)
