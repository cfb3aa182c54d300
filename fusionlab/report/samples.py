"""What samples/ holds: pictures of captions, texts of pictures, likelihoods."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.report import exposure, formatting
from fusionlab.report.pictures import data_uri
from fusionlab.report.records import Run, not_of_format
from fusionlab.report.scores import Score, Scores, split_name, split_note

_RETRIEVAL = ("top1", "top5", "top20", "median_rank", "code_agreement")
_RETRIEVAL_NAMES = {
  "top1": "first",
  "top5": "among the first 5",
  "top20": "among the first 20",
  "median_rank": "median rank",
  "code_agreement": "codes that agree",
}


@dataclasses.dataclass(frozen=True)
class Sample:
  """One generated picture.

  Attributes:
    uri: see `fusionlab.report.pictures.data_uri`, as everywhere here.
    rank: of its own picture among all; None where it was not taken.
  """

  uri: str | None
  rank: int | None


@dataclasses.dataclass(frozen=True)
class Drawn:
  """One caption and what was drawn for it."""

  key: str
  caption: str
  picture: str | None
  reconstruction: str | None
  samples: list[Sample]


@dataclasses.dataclass(frozen=True)
class Grid:
  """The captions of one split.

  Attributes:
    split, name, note: see `fusionlab.report.scores`; the note of the training
      split says what is known of this run.
    retrieval: (what, score) of own-picture retrieval by evaluation.json.
    shown_retrieval: a sentence on the samples shown, by their own ranks.
    drawn: the rows.
  """

  split: str
  name: str
  note: str
  retrieval: list[tuple[str, Score]]
  shown_retrieval: str
  drawn: list[Drawn]


@dataclasses.dataclass(frozen=True)
class Described:
  """One picture and the texts generated for it."""

  caption: str
  picture: str | None
  texts: list[str]


@dataclasses.dataclass(frozen=True)
class Likely:
  """One example and its image loss."""

  caption: str
  picture: str | None
  loss: str


@dataclasses.dataclass(frozen=True)
class Strip:
  """One caption and a picture for it at several denoising steps.

  Attributes:
    caption: what was to be drawn.
    steps: (step, picture), the last as it came out.
  """

  caption: str
  steps: list[tuple[int, str | None]]


@dataclasses.dataclass(frozen=True)
class Samples:
  """Everything of samples.json that is shown, pictures embedded.

  Attributes:
    step: of the checkpoint that was sampled.
    settings: (name, value) of the sampler.
    bank: pictures among which ranks are taken; None where not recorded.
    denoised: whether pictures are continuous, and their loss is a squared error.
    grids: training captions first.
    strips: split's name -> pictures on their way; none of codes.
    described: split's name -> pictures with texts.
    likelihood: (split's name, most likely, least likely).
  """

  step: int | None
  settings: list[tuple[str, str]]
  bank: int | None
  denoised: bool
  grids: list[Grid]
  strips: list[tuple[str, list[Strip]]]
  described: list[tuple[str, list[Described]]]
  likelihood: list[tuple[str, list[Likely], list[Likely]]]


def samples_of(run: Run, scores: Scores | None) -> Samples | None:
  """Reads samples.json and its pictures; None where the run has none.

  Args:
    run: its `samples` and folder, and what it tells of its passes.
    scores: where own-picture retrieval stands.

  Raises:
    UserError: a samples.json of another format.
  """
  if run.samples is None:
    return None
  folder = run.folder / "samples"
  try:
    return _samples(run, run.samples, folder, scores)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise not_of_format(folder / "samples.json", error) from error


def _samples(
  run: Run, content: Mapping[str, Any], folder: Path, scores: Scores | None
) -> Samples:
  step, bank = content.get("step"), content.get("bank")
  step = None if step is None else int(step)
  bank = None if bank is None else int(bank)
  settings = content.get("settings") or {}
  loss = str(content.get("loss") or "nll_per_code")
  return Samples(
    step=step,
    settings=[(k.replace("_", " "), str(v)) for k, v in settings.items()],
    bank=bank,
    denoised=loss != "nll_per_code",
    grids=[
      _grid(
        split,
        exposure.train_note(run, step)
        if split == "train"
        else split_note(split),
        entries,
        folder,
        scores,
        bank,
      )
      for split, entries in _train_first(content.get("grids"))
      if entries
    ],
    strips=[
      (split_name(split), [_strip(e, folder) for e in entries])
      for split, entries in _train_first(content.get("strips"))
      if entries
    ],
    described=[
      (split_name(split), [_described(e, folder) for e in entries])
      for split, entries in _train_first(content.get("described"))
      if entries
    ],
    likelihood=[
      (
        split_name(split),
        [_likely(e, folder, loss) for e in ends.get("most") or []],
        [_likely(e, folder, loss) for e in ends.get("least") or []],
      )
      for split, ends in _train_first(content.get("likelihood"))
      if ends
    ],
  )


def _train_first(section: Any) -> list[tuple[str, Any]]:
  return sorted((section or {}).items(), key=lambda item: item[0] != "train")


def _grid(
  split: str,
  note: str,
  entries: list[Mapping[str, Any]],
  folder: Path,
  scores: Scores | None,
  bank: int | None,
) -> Grid:
  drawn = [_drawn(entry, folder) for entry in entries]
  retrieval = [
    (_RETRIEVAL_NAMES[what], score)
    for what in _RETRIEVAL
    if scores and (score := scores.get(f"own_picture/{what}", split))
  ]
  ranks = [s.rank for d in drawn for s in d.samples if s.rank is not None]
  return Grid(
    split,
    split_name(split),
    note,
    retrieval,
    _of_those_shown(ranks, bank),
    drawn,
  )


def _of_those_shown(ranks: list[int], bank: int | None) -> str:
  if not ranks:
    return ""
  first = sum(rank == 1 for rank in ranks)
  middle = sorted(ranks)
  half = len(middle) // 2
  median = (middle[half] + middle[~half]) / 2
  among = f" of {bank:,}" if bank else ""
  chance = f", by chance {formatting.rank((bank + 1) / 2)}" if bank else ""
  return (
    f"Of the {len(ranks):,} samples shown, {first:,}"
    f" {'is' if first == 1 else 'are'} nearest to the own picture; median rank"
    f" {formatting.rank(median)}{among}{chance}."
  )


def _drawn(entry: Mapping[str, Any], folder: Path) -> Drawn:
  generated = list(entry.get("generated") or [])
  ranks = list(entry.get("ranks") or [])
  ranks += [None] * (len(generated) - len(ranks))
  return Drawn(
    key=str(entry.get("key", "")),
    caption=str(entry["caption"]),
    picture=data_uri(folder, entry.get("picture")),
    reconstruction=data_uri(folder, entry.get("reconstruction")),
    samples=[
      Sample(data_uri(folder, name), None if rank is None else int(rank))
      for name, rank in zip(generated, ranks, strict=False)
    ],
  )


def _described(entry: Mapping[str, Any], folder: Path) -> Described:
  return Described(
    str(entry["caption"]),
    data_uri(folder, entry.get("picture")),
    [str(text) for text in entry.get("generated") or []],
  )


def _strip(entry: Mapping[str, Any], folder: Path) -> Strip:
  return Strip(
    str(entry["caption"]),
    [
      (int(one["step"]), data_uri(folder, one["picture"]))
      for one in entry["steps"]
    ],
  )


def _likely(entry: Mapping[str, Any], folder: Path, loss: str) -> Likely:
  return Likely(
    str(entry["caption"]),
    data_uri(folder, entry.get("picture")),
    formatting.number(float(entry[loss])),
  )
