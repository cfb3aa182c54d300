"""Which curves a page shows: of one run, and of several over each other."""

import re
from collections.abc import Sequence

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
_CAPTION = "caption_nats_per_picture"
_LOSS = re.compile(r"train/(loss/.+)")


def of_one(metrics: Metrics) -> list[Chart]:
  """Draws loss by modality, what captions save, rate, norm and speed.

  Args:
    metrics: of one run; what it lacks is not drawn.
  """
  charts: list[Chart] = []

  def add(title: str, unit: str, lines: list[Line]) -> None:
    if lines:
      name, last = f"c{len(charts)}", int(metrics.steps[-1])
      charts.append(chart(name, title, unit, lines, last_step=last))

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
  """'loss/<modality>' of train and held-out, and what captions save."""
  parts = split_of(metrics.columns)
  names = {metric: None for _, metric in parts.values()}
  names |= {m[1]: None for n in metrics.columns if (m := _LOSS.fullmatch(n))}
  losses = [n for n in names if n.startswith("loss/")]
  # Text first, as everywhere.
  losses.sort(key=lambda name: (name != "loss/text", name))
  return [*losses, *([_CAPTION] if _CAPTION in names else [])]


def _splits(metrics: Metrics) -> list[str]:
  parts = split_of(metrics.columns)
  found = sorted({split for split, _ in parts.values()} - {POOLED})
  return [POOLED, *found]


def _eval_name(split: str, metric: str) -> str:
  return f"eval/{metric}" if split == POOLED else f"eval/{split}/{metric}"


def _title(metric: str) -> str:
  if metric == _CAPTION:
    return "What a caption saves of its picture's loss"
  modality = metric.partition("/")[2].replace("_", " ")
  return f"Loss, {modality}"


def _unit(metric: str) -> str:
  return "nats per picture" if metric == _CAPTION else loss_unit(metric)
