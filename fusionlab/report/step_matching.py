"""Table and curves of a comparison by steps to equal loss.

`results` is what `experiments.compare` writes as comparison.json.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fusionlab.analysis.step_matching import Curve, mean_and_range, step_ratios
from fusionlab.report.scores import metric_name, split_name, split_of


def table_of(results: Mapping[str, Any]) -> list[list[str]]:
  """Rows of the table, the first of them its head.

  Args:
    results: see above; of one seed or more.
  """
  experiments = results["experiments"]
  modalities = list(experiments[results["control"]]["losses"])
  metrics = list(
    dict.fromkeys(m for e in experiments.values() for m in e["metrics"])
  )
  rows = [
    ["", *(f"{m}: loss" for m in modalities), *(_shown(m) for m in metrics),
     *(f"{m}: s" for m in modalities), "s/step", "over control"]
  ]  # fmt: skip
  for name, found in experiments.items():
    of = [found["losses"].get(m, {}) for m in modalities]
    losses = [_spread(loss.get("final_loss", ()), 3) for loss in of]
    scored = [_spread(found["metrics"].get(m, ()), 3) for m in metrics]
    ratios = [_spread(loss.get("s", ()), 2) for loss in of]
    timed = (results["seconds_per_step"] or {}).get(name)
    rows.append([name, *losses, *scored, *ratios, *_seconds(timed)])
  return rows


def _shown(metric: str) -> str:
  """A column's head, 'heldout place: loss, text (nats per token)'."""
  ((split, rest),) = split_of([metric]).values()
  return f"{split_name(split)}: {metric_name(rest)}"


def _seconds(timed: Mapping[str, Any] | None) -> tuple[str, str]:
  """Median of a step, and its ratio with quartiles; '' before it is timed."""
  if timed is None:
    return "", ""
  over = timed["over_control"]
  return (
    f"{timed['seconds']['median']:.3f}",
    f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f})",
  )


def _spread(values: Sequence[float], digits: int) -> str:
  """Mean (least to greatest); a run that never got there is '>1'; '' of none."""
  if not values:
    return ""

  def one(value: float) -> str:
    return ">1" if math.isinf(value) else f"{value:.{digits}f}"

  mean, low, high = mean_and_range(values)
  return f"{one(mean)} ({one(low)} to {one(high)})"


def markdown_of(
  results: Mapping[str, Any], described: Mapping[str, Any]
) -> str:
  """The table with its command, commit and hardware.

  Args:
    results: see above.
    described: see `fusionlab.train.environment.describe`.
  """
  head, *rows = table_of(results)
  lines = [
    "| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)
  ]
  steps = ", ".join(f"{n} {s:,}" for n, s in results["num_steps"].items())
  device, packages = described["devices"], described["packages"]
  return "\n".join(
    [
      *lines,
      "",
      "Loss of all that is held out, at the end: nats a token, of continuous"
      " pictures the mean squared error of their predicted noise; s = steps to the"
      f" last point of `{results['control']}`'s curve / its steps, of the same"
      " seed (the curve: the same part of the held-out data at every point);"
      f" mean (least to greatest) of the seeds {results['seeds']}. Steps:"
      f" {steps}. Seconds: median of steps in turns in one process, and quartiles"
      " of the ratio within a round.",
      "",
      f"Command: `{shlex.join(described['command'])}`, commit {described['commit']};"
      f" {device['count']} x {device['kind']}, {described['host']['cpus']} CPU"
      f" cores, {described['host']['machine']}; jax {packages['jax']}, Python"
      f" {described['python']}.",
      "",
    ]
  )


def draw(results: Mapping[str, Any]) -> Figure:
  """Held-out loss over steps, and s at each of the control's steps.

  Args:
    results: see above.
  """
  experiments = results["experiments"]
  modalities = list(experiments[results["control"]]["losses"])
  with mpl.rc_context({"font.size": 9}):
    figure = Figure(figsize=(4.2 * len(modalities), 6), layout="constrained")
    axes = figure.subplots(2, len(modalities), squeeze=False)
    for column, modality in enumerate(modalities):
      of_control = _curves(experiments[results["control"]], modality)
      for index, (name, found) in enumerate(experiments.items()):
        if not found["losses"].get(modality, {}).get("s"):
          continue  # what others start from
        color = f"C{index}"
        curves = _curves(found, modality)
        _band(axes[0, column], curves, name, color)
        if name != results["control"]:
          ratios = [
            step_ratios(c, o) for c, o in zip(of_control, curves, strict=True)
          ]
          for number, ratio in enumerate(ratios):
            axes[1, column].plot(
              ratio.steps, ratio.losses, color=color, lw=1.2, alpha=0.8,
              label=name if number == 0 else None,
            )  # fmt: skip
      axes[0, column].set(title=f"held-out {modality}", ylabel="loss")
      axes[1, column].axhline(1, color="0.5", lw=0.8)
      axes[1, column].set(
        ylabel=f"s: steps over {results['control']}'s",
        xlabel=f"{results['control']}'s step",
      )
      for axis in axes[:, column]:
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
  return figure


def _curves(found: Mapping[str, Any], modality: str) -> list[Curve]:
  curve = found["losses"][modality]["curve"]
  steps = np.asarray(curve["steps"])
  return [Curve(steps, np.asarray(losses)) for losses in curve["losses"]]


def _band(axis: Any, curves: Sequence[Curve], name: str, color: str) -> None:
  """The mean of the seeds, and between the least and the greatest."""
  losses = np.stack([c.losses for c in curves])
  axis.plot(curves[0].steps, losses.mean(0), color=color, label=name)
  axis.fill_between(
    curves[0].steps, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0
  )
