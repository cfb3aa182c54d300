"""Curves as inline SVG that takes its colours from the page.

Matplotlib draws with colours that stand for names; in the SVG they become CSS
variables and `currentColor`, so one drawing serves light and dark pages. Legends
are HTML beside it, so no text of a run gets into the SVG.
"""

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullLocator,
)

from fusionlab.report import formatting

# Inches, at 72 units of the page each: a telephone shows it at this size.
_SIZE = (4.9, 2.9)
_MOST_POINTS = 400
_FEW_POINTS = 25
_TICKS = [1, 2, 2.5, 5, 10]

_INK, _GRID = "#010203", "#010204"
_SERIES = [f"#0102{index:02x}" for index in range(16, 24)]
_CSS = {_INK: "currentColor", _GRID: "var(--line)"} | {
  color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}
_MARKERS = "os^DvP*X"
# SVG paths of the markers in a legend, around 0.
_MARKER_PATHS = (
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
  "M-3.5-3.5h7v7h-7z",
  "M0-4.5L4.5 3.5h-9z",
  "M0-4.8L4.8 0L0 4.8L-4.8 0z",
  "M0 4.5L4.5-3.5h-9z",
  "M-1.5-4h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
  "M0-5L1.5-1.5L5-1.2L2.2 1.2L3.2 5L0 2.8L-3.2 5L-2.2 1.2L-5-1.2L-1.5-1.5z",
  "M-4-2.5L-2.5-4L0-1.5L2.5-4L4-2.5L1.5 0L4 2.5L2.5 4L0 1.5L-2.5 4L-4 2.5L-1.5 0z",
)


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve.

  Attributes:
    label: for the legend.
    steps, values: finite, of one length.
    style: number of its colour and marker; None is thin and of the text's
      colour, for what is noisy and lies behind.
  """

  label: str
  steps: np.ndarray
  values: np.ndarray
  style: int | None = None


@dataclasses.dataclass(frozen=True)
class LegendEntry:
  """A line of a legend: its SVG swatch, its name and its last value."""

  swatch: str
  label: str
  last: str


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawing with its legend.

  Attributes:
    title: what is drawn.
    unit: of the vertical axis.
    svg: the drawing.
    legend: an entry a line.
  """

  title: str
  unit: str
  svg: str
  legend: list[LegendEntry]

  @property
  def description(self) -> str:
    """What a reader who does not see the drawing is told."""
    ends = "; ".join(f"{e.label}: {e.last} at the end" for e in self.legend)
    return f"{self.title}, {self.unit}, by optimizer step. {ends}"


def chart(
  name: str,
  title: str,
  unit: str,
  lines: Sequence[Line],
  *,
  last_step: int,
  log: bool = False,
) -> Chart:
  """Draws curves over optimizer steps.

  Args:
    name: unique on the page; ids of the SVG begin with it.
    title: what is drawn; may be any text.
    unit: of the values; fixed words, as they get into the SVG.
    lines: each has one point or more.
    last_step: where the horizontal axis ends; it begins at 0.
    log: whether equal ratios of values are as far apart; where all are positive.

  Returns:
    The chart; the same input gives the same bytes.
  """
  settings: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": name,
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
  }
  with mpl.rc_context(settings):
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
      _draw(axes, line)
    _dress(axes, unit, last_step)
    if log and all((line.values > 0).all() for line in lines):
      _scale(axes)
    buffer = io.StringIO()
    figure.savefig(
      buffer, format="svg", metadata={"Date": None}, transparent=True
    )
  svg = _inline(buffer.getvalue(), name)
  return Chart(title, unit, svg, [_legend_entry(line) for line in lines])


def _draw(axes, line: Line) -> None:
  steps, values = _thinned(line.steps, line.values)
  if line.style is None:
    alone = "." if len(steps) == 1 else None
    axes.plot(steps, values, color=_INK, lw=1.0, alpha=0.55, marker=alone)
    return
  style = line.style % len(_SERIES)
  axes.plot(
    steps,
    values,
    color=_SERIES[style],
    lw=1.6,
    marker=_MARKERS[style],
    markevery=1 if len(steps) <= _FEW_POINTS else len(steps) // 8,
    markersize=4.5,
    zorder=3,
  )


def _dress(axes, unit: str, last_step: int) -> None:
  axes.set_xlabel("optimizer step", color=_INK)
  axes.set_ylabel(unit, color=_INK)
  axes.tick_params(colors=_INK, length=3)
  axes.grid(color=_GRID, lw=0.8)
  axes.set_axisbelow(True)
  axes.margins(y=0.06)
  axes.set_xlim(-0.02 * last_step, max(1.02 * last_step, 1))
  for side, spine in axes.spines.items():
    spine.set_visible(side in ("left", "bottom"))
    spine.set_color(_GRID)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_TICKS))
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
  if max(map(abs, axes.get_ylim())) >= 2000:
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
  else:
    axes.yaxis.get_major_formatter().set_useOffset(False)


def _scale(axes) -> None:
  """A logarithmic vertical axis, whose numbers are plain."""
  axes.set_yscale("log")
  # Tens alone, where there are several; else what is between them too.
  low, high = axes.get_ylim()
  between = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)
  if high < 4 * low:
    between = tuple(np.arange(1.0, 10.0))
  axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=8))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
  axes.yaxis.set_minor_locator(NullLocator())


def _thinned(
  steps: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Least and greatest value of each of equal pieces: spikes stay."""
  if len(steps) <= _MOST_POINTS:
    return steps, values
  kept = {0, len(steps) - 1}
  for piece in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):
    kept |= {int(piece[values[piece].argmin()])}
    kept |= {int(piece[values[piece].argmax()])}
  rows = sorted(kept)
  return steps[rows], values[rows]


def _inline(svg: str, name: str) -> str:
  """The <svg> element alone, its ids its own, coloured by the page."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
  svg = svg.replace("xlink:href", "href")
  svg = re.sub(r'\bid="', f'id="{name}-', svg)
  svg = re.sub(r'href="#', f'href="#{name}-', svg)
  svg = svg.replace("url(#", f"url(#{name}-")
  # The page sets the size and hides the drawing from readers of the text.
  svg = re.sub(
    r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
    r'<svg \1 aria-hidden="true" focusable="false">',
    svg,
    count=1,
  )
  for color, css in _CSS.items():
    svg = svg.replace(color, css)
  return re.sub(r"\n\s*", "\n", svg).strip()


def _legend_entry(line: Line) -> LegendEntry:
  last = float(line.values[-1]) if len(line.values) else math.nan
  if line.style is None:
    drawn = '<path d="M1 7h24" stroke="currentColor" opacity=".55"/>'
  else:
    style = line.style % len(_SERIES)
    color = f"var(--series-{style})"
    drawn = (
      f'<path d="M1 7h24" stroke="{color}" stroke-width="2"/>'
      f'<path d="{_MARKER_PATHS[style]}" transform="translate(13 7)"'
      f' fill="{color}"/>'
    )
  swatch = f'<svg viewBox="0 0 26 14" aria-hidden="true">{drawn}</svg>'
  return LegendEntry(swatch, line.label, formatting.number(last))
