"""Held-out scores: evaluation.json's with intervals, else the last row's."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from fusionlab.report import denoising, exposure, formatting
from fusionlab.report.records import Run, not_of_format

POOLED = "all"

# First words of metrics. Any other word after 'eval/' is the name of a split.
_METRICS = {
  "accuracy": "accuracy",
  "bits_per_byte": "bits per byte",
  "caption_mse_gain": "what the caption saves of the mean squared error",
  "caption_nll_per_token": "caption after its picture, nats per token",
  "caption_nats_per_picture": "what the caption saves, nats per picture",
  "caption_to_image": "picking the picture of a caption",
  "code_agreement": "codes that agree",
  "image_denoising_mse": "picture after its caption, mean squared error of its"
  " predicted noise",
  "image_nll_per_code": "picture after its caption, nats per code",
  "image_to_caption": "picking the caption of a picture",
  "image_unigram_nll_per_code": "picture by code frequencies alone, nats per code",
  "loss": "loss",
  "mse": "denoising error",
  "own_picture": "own picture found by a sample",
  "total_loss": "loss in all, that of pictures weighted",
  "z_loss": "z loss",
}
_UNITS = {
  "loss": "nats per token",
  "loss/image": "nats per code",
  "loss/text": "nats per token",
}
_FRACTIONS = ("accuracy", "code_agreement", "top1", "top5", "top20")

_SPLITS = {
  POOLED: ("all held out", ""),
  "train": ("Training captions", exposure.NOT_KNOWN),
  # Of a user's sources, with pictures or without.
  "heldout": ("Held-out examples", "Never trained on."),
  "heldout_style": (
    "Held-out (picture, style) pairs",
    "Each picture was trained on in its other style only.",
  ),
  "heldout_picture": (
    "Held-out pictures",
    "Trained on in no style, tone or gender.",
  ),
  "heldout_place": (
    "Held-out places",
    "Nothing of the place was trained on, neither its flag nor a fact.",
  ),
}


@dataclasses.dataclass(frozen=True)
class Score:
  """One number.

  Attributes:
    metric: its name without 'eval/' and split.
    value: nats, bits, a fraction or a rank, as the metric has it.
    interval: 95 %, where it was computed.
    count: examples behind it, where recorded.
    chance: what guessing gives, where recorded.
  """

  metric: str
  value: float
  interval: tuple[float, float] | None = None
  count: int | None = None
  chance: float | None = None

  def text(self, value: float) -> str:
    """Writes a value of this metric; fractions are percentages."""
    parts = self.metric.split("/")
    if "median_rank" in parts:
      return formatting.rank(value)
    fraction = any(part in _FRACTIONS for part in parts)
    return (formatting.percent if fraction else formatting.number)(value)

  @property
  def shown(self) -> str:
    """The value."""
    return self.text(self.value)

  @property
  def shown_interval(self) -> str:
    """'[1.9, 2.1]', or nothing."""
    if self.interval is None:
      return ""
    low, high = (self.text(bound) for bound in self.interval)
    return f"[{low.removesuffix(' %')}, {high.removesuffix(' %')}]"

  @property
  def shown_notes(self) -> str:
    """'n 256, chance 3.1 %', or what of it is known."""
    notes = []
    if self.count is not None:
      notes.append(f"n {self.count:,}")
    if self.chance is not None:
      notes.append(f"chance {self.text(self.chance)}")
    return ", ".join(notes)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Held-out scores of one run at one step.

  Attributes:
    step: optimizer steps taken.
    scored: whether they are evaluation.json's.
    resamples: of the bootstrap behind the intervals, where recorded.
    table: metric -> split -> score.
    splits: in the order of columns.
  """

  step: int
  scored: bool
  resamples: int | None
  table: dict[str, dict[str, Score]]
  splits: list[str]

  def get(self, metric: str, split: str) -> Score | None:
    """One score; None where it was not taken."""
    return self.table.get(metric, {}).get(split)


def split_name(split: str) -> str:
  """A split's name for a heading or a column."""
  return _SPLITS.get(split, (split.replace("_", " "), ""))[0]


def split_note(split: str) -> str:
  """What was trained on of a split's examples, in a sentence; may be empty."""
  return _SPLITS.get(split, ("", ""))[1]


def metric_name(metric: str) -> str:
  """'loss/image' as 'loss, image (nats per code)'."""
  unit, level = loss_unit(metric), denoising.level_of(metric)
  if level is not None:
    metric = metric.removesuffix(f"/t{level}")
  head, _, rest = metric.partition("/")
  name = _METRICS.get(head, head.replace("_", " "))
  if rest:
    words = re.sub(r"\btop(\d)", r"top \1", rest.replace("_", " "))
    name += ", " + words.replace("/", ", ")
  if level is not None:
    name += f", at noise {level}"
  return f"{name} ({unit})" if unit else name


def loss_unit(metric: str) -> str:
  """The unit of 'loss', 'loss/<modality>', 'mse/<…>'; '' of anything else."""
  if metric.startswith("mse/"):
    return "mean squared error"
  default = "nats per token" if metric.startswith("loss") else ""
  return _UNITS.get(metric, default)


def split_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """Takes names 'eval/<split>/<metric>' and 'eval/<metric>' apart.

  Args:
    names: all of one file: a name that others end with is a pooled one.

  Returns:
    Name -> (split, metric) for those that begin with 'eval/'.
  """
  rests = [name.removeprefix("eval/") for name in names if name[:5] == "eval/"]
  # 'loss/image' where 'a_split/loss/image' is there too.
  tails = {rest.partition("/")[2] for rest in rests}
  parts = {}
  for rest in rests:
    head, _, tail = rest.partition("/")
    pooled = head in _METRICS or not tail or rest in tails
    parts[f"eval/{rest}"] = (POOLED, rest) if pooled else (head, tail)
  return parts


def scores_of(run: Run) -> Scores | None:
  """The newest held-out scores of a run; None where there are none.

  Raises:
    UserError: an evaluation.json of another format.
  """
  if run.evaluation is not None:
    try:
      return _evaluation(run.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      path = run.folder / "evaluation.json"
      raise not_of_format(path, error) from error
  row = run.metrics.newest_row("eval/")
  if row is None:
    return None
  step, values = row
  return _scores(values, {"step": step}, scored=False)


def _evaluation(content: dict[str, Any]) -> Scores:
  values = {
    name: math.nan if value is None else float(value)
    for name, value in content["metrics"].items()
  }
  return _scores(values, content, scored=True)


def _scores(
  values: dict[str, float], content: dict[str, Any], *, scored: bool
) -> Scores:
  intervals = content.get("intervals") or {}
  counts = content.get("counts") or {}
  chance = content.get("chance") or {}
  table: dict[str, dict[str, Score]] = {}
  splits: dict[str, None] = {}
  modalities = denoising.denoised(values)
  for name, (split, metric) in split_of(values).items():
    if metric == "pictures":  # of a batch
      continue
    metric = denoising.renamed(metric, modalities)
    if modalities and metric == "loss":
      metric = "total_loss"
    interval = intervals.get(name)
    if interval is not None:
      low, high = interval
      interval = (float(low), float(high))
    table.setdefault(metric, {})[split] = Score(
      metric,
      values[name],
      interval,
      None if counts.get(name) is None else int(counts[name]),
      None if chance.get(name) is None else float(chance[name]),
    )
    splits[split] = None
  order = sorted(splits, key=lambda split: split != POOLED)
  resamples = content.get("resamples")
  return Scores(int(content["step"]), scored, resamples, table, order)
