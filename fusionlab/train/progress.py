"""Progress of a run: a bar on a terminal, a line per interval elsewhere."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
)


def duration(seconds: float) -> str:
  """Writes seconds as '1:02:03' or '2:03'; '-' where not known."""
  if not math.isfinite(seconds):
    return "-"
  minutes, seconds = divmod(max(int(seconds + 0.5), 0), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


def _loss_text(row: Mapping[str, float], prefix: str) -> str:
  """'text 4.21  image 2.73' from `<prefix>loss/<modality>`; loss if none."""
  start = f"{prefix}loss/"
  parts = [
    f"{name.removeprefix(start)} {value:.3f}"
    for name, value in row.items()
    if name.startswith(start)
  ]
  if not parts and f"{prefix}loss" in row:
    parts = [f"loss {row[f'{prefix}loss']:.3f}"]
  return "  ".join(parts)


class ProgressReport:
  """Shows steps, loss per modality, tokens/s and time left."""

  def __init__(
    self,
    start: int,
    total: int,
    *,
    deadline: float | None = None,
    console: Console | None = None,
    enabled: bool = True,
  ):
    """Begins to show.

    Args:
      start: steps already taken.
      total: `config.train.num_steps`.
      deadline: `time.monotonic()` at which the run ends in any case.
      console: where to; default standard error, so that output can be piped.
      enabled: False on all processes but the first.
    """
    self.console = console or Console(stderr=True, highlight=False)
    self.enabled = enabled
    self.total = total
    self.deadline = deadline
    self._bar: Progress | None = None
    self._losses = self._speed = self._left = ""
    if enabled and self.console.is_terminal:
      self._bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[losses]}  {task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
        console=self.console,
      )
      self._task = self._bar.add_task(
        "train", total=total, completed=start, losses="", speed="", left=""
      )
      self._bar.start()

  def step(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def row(self, step: int, row: Mapping[str, float], step_s: float) -> None:
    """Shows a row of training metrics.

    Args:
      step: steps taken.
      row: see `fusionlab.train.metrics`.
      step_s: seconds per step; nan where not known yet.
    """
    if not self.enabled:
      return
    self._losses = _loss_text(row, "train/") or self._losses
    if "perf/tokens_per_s" in row:
      self._speed = f"{row['perf/tokens_per_s']:,.0f} tokens/s"
    left = (self.total - step) * step_s
    if self.deadline is not None:
      left = min(left, self.deadline - time.monotonic())
    self._left = f"{duration(left)} left"
    if self._bar is not None:
      self._bar.update(
        self._task,
        completed=step,
        losses=self._losses,
        speed=self._speed,
        left=self._left,
      )
      return
    parts = (f"step {step}/{self.total}", self._losses, self._speed, self._left)
    self.say("  ".join(part for part in parts if part))

  def evaluation(self, step: int, row: Mapping[str, float]) -> None:
    """Shows held-out losses, pooled over the splits."""
    text = _loss_text(row, "eval/")
    nats = row.get("eval/caption_nats_per_picture")
    if nats is not None:
      text += f"  caption {nats:.2f} nats/picture"
    saved = row.get("eval/caption_mse_gain")
    if saved is not None:
      text += f"  caption {saved:.4f} of mse"
    self.say(f"step {step}  held-out  {text}")

  def say(self, text: str) -> None:
    """Prints one line, above the bar where there is one."""
    if self.enabled:
      self.console.print(text, markup=False, soft_wrap=True)

  def close(self) -> None:
    """Leaves the last state of the bar on the screen."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
