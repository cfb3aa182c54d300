"""`<workdir>/samples`: what a model draws and writes, as the report shows it."""

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusionlab.evaluate.captioned import Captioned
from fusionlab.evaluate.examples import ExampleScore
from fusionlab.evaluate.pictures import Gallery

_EXTREMES = 8  # most and least likely examples that are shown
_STRIPS = 4  # captions of a split whose pictures are shown on their way


@dataclasses.dataclass(frozen=True)
class Shown:
  """A split's examples for the report.

  Attributes:
    grid: whose captions are drawn several times.
    extremes: "most" and "least" likely examples with their scores.
  """

  grid: Sequence[Captioned]
  extremes: Mapping[str, Sequence[tuple[Captioned, ExampleScore]]]

  @property
  def examples(self) -> list[Captioned]:
    """All of them."""
    pairs = [pair for of in self.extremes.values() for pair in of]
    return [*self.grid, *(example for example, _ in pairs)]

  @classmethod
  def choose(
    cls,
    examples: Sequence[Captioned],
    scores: Sequence[ExampleScore],
    rows: int,
  ) -> "Shown":
    """Takes the first examples for the grid, and the extremes of all.

    Args:
      examples: in random order.
      scores: of each.
      rows: of the grid.
    """
    order = np.argsort([s.mean_loss for s in scores], kind="stable")
    pairs = [(examples[i], scores[i]) for i in order]
    return cls(
      examples[:rows],
      {"most": pairs[:_EXTREMES], "least": pairs[::-1][:_EXTREMES]},
    )


def write(
  workdir: Path,
  gallery: Gallery,
  splits: Mapping[str, Shown],
  step: int,
) -> None:
  """Replaces `<workdir>/samples` by a new folder when that is whole.

  Args:
    workdir: the run's folder.
    gallery: draws.
    splits: what is shown of each.
    step: of the checkpoint.
  """
  started = time.monotonic()
  partial = Path(tempfile.mkdtemp(dir=workdir, prefix=".samples-"))
  try:
    real = gallery.originals(
      [e for shown in splits.values() for e in shown.examples]
    )
    pages = {
      split: _Page(gallery, shown, real, partial / split)
      for split, shown in splits.items()
    }
    content = {
      "step": step,
      "bank": gallery.bank_size,
      "loss": gallery.loss_name,
      "settings": {
        **gallery.settings,
        "num_samples": gallery.config.num_samples,
      },
      "grids": {k: page.grid() for k, page in pages.items()},
      "strips": {k: page.strips for k, page in pages.items() if k != "train"},
      "described": {
        k: page.described() for k, page in pages.items() if k != "train"
      },
      "likelihood": {k: page.extremes() for k, page in pages.items()},
    }
    content["seconds"] = round(time.monotonic() - started, 1)
    (partial / "samples.json").write_text(json.dumps(content, indent=1) + "\n")
    partial.chmod(0o755)
    shutil.rmtree(workdir / "samples", ignore_errors=True)
    os.replace(partial, workdir / "samples")
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


class _Page:
  """One split's entries of `samples.json`; writes their PNGs.

  Attributes:
    strips: after `grid`, pictures at several denoising steps; none of codes.
  """

  def __init__(
    self,
    gallery: Gallery,
    shown: Shown,
    real: Mapping[tuple[str, str], np.ndarray],
    folder: Path,
  ):
    self._gallery, self._shown = gallery, shown
    self._real, self._folder = real, folder
    folder.mkdir()
    self.strips: list[dict[str, Any]] = []
    self._said = [gallery.tokenizers.text.decode(e.caption) for e in shown.grid]

  def grid(self) -> list[dict[str, Any]]:
    """Caption, real picture, the tokenizer's, samples and their ranks."""
    gallery, examples = self._gallery, self._shown.grid
    if not examples:
      return []
    number = gallery.config.num_samples
    drawn = gallery.draw(examples, number, snapshots=True)
    ranks = gallery.ranks(examples, drawn)
    tokens = gallery.reconstructed(examples)
    rows = []
    for i, example in enumerate(examples):
      at = range(i * number, (i + 1) * number)
      rows.append(
        {
          "key": example.key,
          "caption": self._said[i],
          "picture": self._original(f"{i}_picture", example),
          "reconstruction": self._save(f"{i}_tokens", tokens[i]),
          "generated": [
            self._save(f"{i}_{drawn[d].sample}", drawn[d].pictures[0])
            for d in at
          ],
          "ranks": [int(ranks[d]) for d in at],
        }
      )
      if gallery.continuous and i < _STRIPS:
        first = drawn[at[0]].snapshots[0]
        self.strips.append(self._strip(rows[-1], f"{i}_step", first))
    return rows

  def _strip(
    self, row: Mapping[str, Any], name: str, snapshots: np.ndarray
  ) -> dict[str, Any]:
    """The first sample of a row on its way, and as it came out."""
    steps = self._gallery.snapshot_steps
    shown = [
      {"step": step + 1, "picture": self._save(f"{name}{step + 1}", picture)}
      for step, picture in zip(steps, snapshots, strict=True)
    ]
    last = self._gallery.config.diffusion_steps
    shown.append({"step": last, "picture": row["generated"][0]})
    return {"key": row["key"], "caption": row["caption"], "steps": shown}

  def described(self) -> list[dict[str, Any]]:
    """Captions that the model writes for the grid's pictures."""
    if not self._shown.grid:
      return []
    written = self._gallery.describe(self._shown.grid)
    return [
      {
        "key": example.key,
        "caption": self._said[i],
        "picture": self._original(f"{i}_picture", example),
        "generated": [d.text for d in written if d.prompt == i],
      }
      for i, example in enumerate(self._shown.grid)
    ]

  def extremes(self) -> dict[str, list[dict[str, Any]]]:
    """The most and the least likely examples."""
    return {
      which: [
        {
          "key": example.key,
          "caption": score.caption,
          "picture": self._original(f"{which}_{i}", example),
          self._gallery.loss_name: score.mean_loss,
        }
        for i, (example, score) in enumerate(pairs)
      ]
      for which, pairs in self._shown.extremes.items()
    }

  def _original(self, name: str, example: Captioned) -> str | None:
    picture = self._real.get((example.source, example.key))
    return None if picture is None else self._save(name, picture)

  def _save(self, name: str, picture: np.ndarray) -> str:
    Image.fromarray(picture).save(self._folder / f"{name}.png")
    return f"{self._folder.name}/{name}.png"
