"""Scores a checkpoint on everything held out, draws, and shows a table."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from fusionlab.errors import UserError
from fusionlab.evaluate import samples
from fusionlab.evaluate.captioned import (
  Captioned,
  caption_after_picture,
  captioned_examples,
  distinct,
)
from fusionlab.evaluate.examples import ExampleScore, example_scores
from fusionlab.evaluate.heldout import caption_worth, evaluate
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.evaluate.matching import document_scores, match
from fusionlab.evaluate.pictures import Gallery
from fusionlab.evaluate.results import Results
from fusionlab.evaluate.samples import Shown
from fusionlab.evaluate.unigram import unigram, unigram_nll
from fusionlab.experiment import Experiment
from fusionlab.report.scores import split_of
from fusionlab.sharding import rules
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train.metrics import Row
from fusionlab.train.setup import Setup, build
from fusionlab.train.step import make_eval_step
from fusionlab.train.workdir import write_json


def run(
  workdir: str,
  experiment: Experiment | None = None,
  *,
  step: int | None = None,
  console: Console | None = None,
  heldout: Row | None = None,
) -> dict[str, Any]:
  """Scores one checkpoint of a workdir on all held-out batches.

  Args:
    workdir: the run's folder.
    experiment: where given, its `mesh`, `evaluate`, `data.cache_dir` and
      `data.prefetch` are used; everything else is as the checkpoint recorded it.
    step: which checkpoint; None takes the newest good one.
    console: where the table goes; default standard output.
    heldout: what `fusionlab.evaluate.heldout.evaluate` returned for this very
      checkpoint and all that is held out; None computes it.

  Returns:
    {"step", "checkpoint", "metrics", "intervals", "counts", "chance", …}, which
    is also written to `<workdir>/evaluation.json`; what was drawn goes to
    `<workdir>/samples`. The moving average of the parameters is scored where one
    is kept.

  Raises:
    UserError: no such checkpoint, or a corrupted one.
  """
  folder = Path(workdir).expanduser()
  path = folder
  if step is not None:
    path = folder / "checkpoints" / str(step)
    if not path.is_dir():
      have = checkpoints.steps_in(folder / "checkpoints")
      raise UserError(
        f"{folder} has no checkpoint of step {step}; it has"
        f" {', '.join(map(str, have)) or 'none'}"
      )
  found = checkpoints.look(path)
  setup = build(
    _placed(found.experiment, experiment), tokenizers=found.tokenizers
  )
  params = checkpoints.load_scored(
    found,
    rules.param_shardings(setup.model.param_axes(), found.scored, setup.mesh),
  )
  started = time.monotonic()
  console = console or Console()
  config = setup.experiment.evaluate
  with _progress(console) as tell:
    if heldout is None:
      tell("held-out losses")
      heldout = evaluate(
        make_eval_step(setup.model, setup.objective, mesh=setup.mesh),
        params,
        setup.data.heldout,
        setup.data.uncaptioned,
        setup.mesh,
        caption=caption_worth(setup.tokenizers),
      )
    results = Results(seed=config.seed, metrics=dict(heldout))
    splits = _captioned(setup)
    gallery, shown = None, {}
    if splits:
      scorer = Scorer(
        setup.model, params, objective=setup.objective, mesh=setup.mesh
      )
      table = _code_frequencies(setup)
      bank = [e for drawn in splits.values() for e in drawn]
      gallery = Gallery(
        setup.model, params, setup.tokenizers, setup.experiment, bank
      )
      for split, drawn in splits.items():
        tell(f"captions and pictures of {split}")
        examples = drawn[: config.examples]
        scores = example_scores(scorer, examples, setup.tokenizers.text)
        _score_pictures(split, examples, scores, table, setup, results)
        _score_captions(split, examples, scorer, results)
        _match(split, drawn, scorer, config.matched, results)
        if config.drawn:
          gallery.measure(split, examples[: config.drawn], results)
        shown[split] = Shown.choose(examples, scores, config.grid)
    result = {
      "step": found.step,
      "checkpoint": str(found.folder),
      **results.as_mapping(),
    }
    if jax.process_index() == 0:
      if gallery is not None:
        tell("pictures for the report")
        samples.write(folder, gallery, shown, found.step)
      result["seconds"] = round(time.monotonic() - started, 1)
      write_json(folder / "evaluation.json", result)
  if jax.process_index() == 0:
    console.print(table_of(results.metrics, found.step))
  return result


def _captioned(setup: Setup) -> dict[str, list[Captioned]]:
  """Captioned pictures of each split, in random order, as many as the bank has."""
  config, data = setup.experiment.evaluate, setup.data
  if not config.examples or len(data.vocabulary.modalities) < 2:
    return {}
  if jax.process_count() > 1:
    logging.warning(
      "captions and pictures are scored and drawn by one process: run"
      " --mode=evaluate with this --workdir on one machine"
    )
    return {}
  names = {split for p in data.prepared.values() for split in p.splits}
  splits = {}
  for split in sorted(names, key=lambda name: (name != "train", name)):
    found = captioned_examples(
      data.prepared,
      split,
      data.vocabulary,
      limit=max(config.bank, config.examples),
      seed=config.seed,
    )
    if found:
      splits[split] = found
  return splits


def _code_frequencies(setup: Setup) -> np.ndarray | None:
  """The unigram code model; None where pictures are continuous."""
  if setup.data.vocabulary.continuous:
    return None
  return unigram(setup.data.prepared, setup.data.vocabulary, limit=10_000)


def _score_pictures(
  split: str,
  examples: Sequence[Captioned],
  scores: Sequence[ExampleScore],
  table: np.ndarray | None,
  setup: Setup,
  results: Results,
) -> None:
  """Loss after the caption, that of codes beside the unigram code model's."""
  positions = np.array([s.positions for s in scores])
  loss = np.array([s.loss for s in scores])
  if table is None:
    results.add(f"eval/{split}/image_denoising_mse", loss, positions)
    return
  alone = [unigram_nll(table, e.codes, setup.data.vocabulary) for e in examples]
  results.add(f"eval/{split}/image_nll_per_code", loss, positions)
  results.add(
    f"eval/{split}/image_unigram_nll_per_code", np.array(alone), positions
  )


def _score_captions(
  split: str,
  examples: Sequence[Captioned],
  scorer: Scorer,
  results: Results,
) -> None:
  """Loss of captions behind their pictures, the end of the document included."""
  log_p = document_scores(
    scorer, [caption_after_picture(e, e, scorer.vocabulary) for e in examples]
  )
  tokens = np.array([len(e.caption) + 1 for e in examples])
  results.add(f"eval/{split}/caption_nll_per_token", -log_p, tokens)


def _match(
  split: str,
  drawn: Sequence[Captioned],
  scorer: Scorer,
  matched: int,
  results: Results,
) -> None:
  """The right picture, and the right caption, among 32."""
  chosen = distinct(drawn, matched)
  if len(chosen) < 2:
    return
  found = match(scorer, chosen)
  for name, hits in found.hits.items():
    which = name.replace("/likelihood", "/top1_by_likelihood")
    which = which if which != name else f"{name}/top1"
    results.add(f"eval/{split}/{which}", hits, chance=found.chance)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
  """Shows what is being done: a spinner, or a line each where nobody watches."""
  if not console.is_terminal:
    yield lambda what: console.print(f"evaluating: {what}", highlight=False)
    return
  with console.status("evaluating") as status:
    yield lambda what: status.update(f"evaluating: {what}")


def _placed(recorded: Experiment, given: Experiment | None) -> Experiment:
  """The recorded configuration on the devices and caches of this machine."""
  if given is None:
    return recorded
  data = dataclasses.replace(
    recorded.data,
    cache_dir=given.data.cache_dir,
    prefetch=given.data.prefetch,
  )
  return dataclasses.replace(
    recorded, mesh=given.mesh, data=data, evaluate=given.evaluate
  )


def table_of(row: Row, step: int) -> Table:
  """Lays out held-out metrics, one line a metric and one column a split.

  Args:
    row: see `fusionlab.evaluate.heldout.evaluate`.
    step: for the title.
  """
  cells: dict[str, dict[str, float]] = {}
  splits: dict[str, None] = {}
  for name, (split, metric) in split_of(row).items():
    splits[split] = None
    cells.setdefault(metric, {})[split] = row[name]
  shown = Table(title=f"held-out, step {step}")
  shown.add_column("metric", overflow="fold")
  for split in splits:
    name = split.removeprefix("heldout_")
    shown.add_column(name, justify="right", no_wrap=True)
  for metric, values in cells.items():
    shown.add_row(
      metric, *(f"{values[s]:.4g}" if s in values else "" for s in splits)
    )
  return shown
