r"""Trains several configs over several seeds, and says how many steps each needs.

  python -m experiments.compare --config=configs/compare_mot.py
  python -m experiments.compare --config=configs/compare_mot.py \
      --config.seeds=0,1 --config.experiments.mot.model.untie='ffn o' --workdir=runs/o

The config names any experiments and which of them is the control. Every run is a
workdir of its own, `<workdir>/<experiment>_s<seed>`; the same command goes on where it
was stopped. After each run the table is written anew: `comparison.json`,
`comparison.md`, `comparison.svg`, and at the end `comparison.html` with all curves of
the first seed.

An experiment whose `init.checkpoint` names another starts from that one's end, of the
same seed (configs/compare_lmfusion.py).

s = steps to the control's final held-out loss / the control's steps, of one seed
(arXiv 2411.04996, section 3.1), read off the curves of the evaluations at intervals;
below 1 fewer steps are needed. At the end all steps are timed in turns.
"""

import os

# See experiments/run.py.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.run import guarded
from fusionlab import evaluate, report
from fusionlab.analysis.step_matching import Curve, final_step_ratio
from fusionlab.config import option
from fusionlab.errors import ConfigError, UserError, nearest
from fusionlab.experiment import Experiment
from fusionlab.report.metrics import read_metrics
from fusionlab.report.step_matching import draw, markdown_of, table_of
from fusionlab.tokenizers import load_tokenizers
from fusionlab.train import environment, loop
from fusionlab.train import workdir as workdirs

_EXAMPLE = "--config=configs/compare_mot.py"
_ROUNDS = 12
# Of FLOPs a step, within which two experiments count as equal.
_EQUAL = 1e-3


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What is compared: experiments by name, each over the same seeds."""

  experiments: dict[str, Experiment] = option(
    dict, "what is trained, by name, in the order of the table"
  )
  control: str = option("", "the experiment that the others are measured by")
  seeds: tuple[int, ...] = option(
    (0, 1, 2), "config.train.seed of each run", minimum=0
  )
  equal_flops: bool = option(
    True, "refuse experiments whose model FLOPs a step differ"
  )
  metrics: tuple[str, ...] = option(
    (),
    "of evaluation.json, beside the losses, e.g. 'eval/train/own_picture/top1';"
    " every run is then evaluated at its end as config.evaluate says",
  )

  @property
  def starts(self) -> set[str]:
    """Experiments that others start from."""
    checkpoints = {e.init.checkpoint for e in self.experiments.values()}
    return checkpoints & set(self.experiments)

  def check(self, path: str) -> None:
    """Raises ConfigError where a table would have no meaning."""
    names = list(self.experiments)
    if len(names) < 2:
      raise ConfigError(
        f"{path}.experiments has {len(names)}; give two or more"
      )
    if self.control not in names:
      raise ConfigError(
        f"{path}.control={self.control!r} is none of"
        f" {path}.experiments{nearest(self.control, names)}"
      )
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise ConfigError(f"{path}.seeds={self.seeds} must be different seeds")
    for name, experiment in self.experiments.items():
      start = experiment.init.checkpoint
      if start in names and self.experiments[start].init.checkpoint in names:
        raise ConfigError(
          f"{path}.experiments.{name}.init.checkpoint={start!r} starts from"
          f" another experiment itself; give one that does not"
        )
      where = f"{path}.experiments.{name}.train"
      if experiment.train.max_seconds:
        raise ConfigError(
          f"{where}.max_seconds={experiment.train.max_seconds:g} would end runs"
          f" at steps that cannot be compared; set it to 0"
        )
      if not 0 < experiment.train.eval_every < experiment.train.num_steps:
        raise ConfigError(
          f"{where}.eval_every={experiment.train.eval_every} gives no curve of"
          f" {where}.num_steps={experiment.train.num_steps}; set it to a"
          f" twentieth of them, say"
        )


def check_flops(comparison: Comparison) -> None:
  """Refuses experiments that do not spend the same model FLOPs a step.

  Raises:
    UserError: with each experiment's FLOPs.
  """
  flops = {}
  for name, e in comparison.experiments.items():
    tokenizers = load_tokenizers(
      e.data.text_tokenizer,
      e.data.image_tokenizer,
      latent_patch=e.data.latent_patch,
    )
    per_token = e.model.forward_flops_per_token(
      tokenizers.vocabulary.size, e.data.row_length
    )
    flops[name] = 3 * per_token * e.data.row_length * e.train.batch_size
  base = flops[comparison.control]
  if any(abs(f / base - 1) > _EQUAL for f in flops.values()):
    each = ", ".join(f"{n} {f / 1e9:.2f}" for n, f in flops.items())
    raise UserError(
      f"the experiments spend different model FLOPs a step (GFLOP: {each}), so"
      f" steps do not compare; make them equal, or say"
      f" --config.equal_flops=False"
    )


def train_all(comparison: Comparison, workdir: Path) -> bool:
  """Trains what is not finished yet, seed by seed.

  Args:
    comparison: what is trained.
    workdir: the folder of all runs.

  Returns:
    Whether all runs are finished; False after a signal.

  Raises:
    UserError: see `fusionlab.train.loop.train`.
  """
  runs = runs_of(comparison, workdir)
  for number, (name, seed, folder) in enumerate(runs, start=1):
    experiment = experiment_of(comparison, name, seed, workdir)
    steps = experiment.train.num_steps
    complete = workdirs.finished_at(folder) == steps
    if complete:
      before = workdirs.recorded(folder)
      if before is not None:  # refuses a folder of another config
        workdirs.resume(experiment, before, folder)
    else:
      print(f"run {number} of {len(runs)}: {folder}", flush=True)
      loop.train(experiment, str(folder))
      if workdirs.finished_at(folder) is None:
        return False
    if comparison.metrics and evaluate.evaluated_at(str(folder)) != steps:
      heldout = evaluate.heldout_at(str(folder), steps)
      evaluate.run(str(folder), experiment, heldout=heldout)
      complete = False
    if not complete:
      write_results(comparison, workdir)
  return True


def experiment_of(
  comparison: Comparison, name: str, seed: int, workdir: Path
) -> Experiment:
  """One run's experiment: with its seed, and the folder that it starts from.

  Args:
    comparison: what is compared.
    name: of the experiment.
    seed: one of the comparison's.
    workdir: the folder of all runs.
  """
  given = comparison.experiments[name]
  init = given.init
  if init.checkpoint in comparison.experiments:
    start = workdir / f"{init.checkpoint}_s{seed}"
    init = dataclasses.replace(init, checkpoint=str(start))
  return dataclasses.replace(
    given, init=init, train=dataclasses.replace(given.train, seed=seed)
  )


def runs_of(
  comparison: Comparison, workdir: Path
) -> list[tuple[str, int, Path]]:
  """Name, seed and folder of each run, in the order in which they train."""
  starts = comparison.starts
  return [
    (name, seed, workdir / f"{name}_s{seed}")
    for seed in comparison.seeds
    for name in sorted(comparison.experiments, key=lambda n: n not in starts)
  ]


@dataclasses.dataclass(frozen=True)
class Finished:
  """What a finished run left.

  Attributes:
    curves: modality -> held-out loss over steps, nats a token.
    final: modality -> loss of all held-out data at the end.
    metrics: those of evaluation.json, where there is one.
  """

  curves: dict[str, Curve]
  final: dict[str, float]
  metrics: dict[str, float]

  @classmethod
  def read(cls, folder: Path) -> "Finished":
    """Reads a run's metrics.

    The last evaluation is of all held-out data (`config.train.eval_batches`),
    the others of the same part of it each: a curve must not mix them.
    """
    scored: dict[str, float] = {}
    if evaluate.evaluated_at(str(folder)) is not None:
      content = (folder / "evaluation.json").read_text("utf-8")
      scored = json.loads(content)["metrics"]
    metrics = read_metrics(folder)
    curves, final = {}, {}
    for name in metrics.columns:
      if name.startswith("eval/loss/"):
        steps, losses = metrics.series(name)
        modality = name.removeprefix("eval/loss/")
        curves[modality] = Curve(steps[:-1], losses[:-1])
        final[modality] = float(losses[-1])
    return cls(curves, final, scored)


def results_of(comparison: Comparison, workdir: Path) -> dict[str, Any]:
  """Figures of all seeds that every experiment has finished, JSON-ready."""
  finished: dict[int, dict[str, Finished]] = {}
  for name, seed, folder in runs_of(comparison, workdir):
    steps = comparison.experiments[name].train.num_steps
    complete = workdirs.finished_at(folder) == steps
    if comparison.metrics:
      complete &= evaluate.evaluated_at(str(folder)) == steps
    if complete:
      finished.setdefault(seed, {})[name] = Finished.read(folder)
  seeds = [
    s for s, f in finished.items() if len(f) == len(comparison.experiments)
  ]
  results: dict[str, Any] = {
    "control": comparison.control,
    "seeds": seeds,
    "num_steps": {
      n: e.train.num_steps for n, e in comparison.experiments.items()
    },
    "untie": {n: e.model.untie for n, e in comparison.experiments.items()},
    "experiments": {},
  }
  starts = comparison.starts
  for name in comparison.experiments if seeds else ():
    each = [(finished[s][comparison.control], finished[s][name]) for s in seeds]
    losses = {}
    for modality in sorted(each[0][0].curves, key=lambda m: (m != "text", m)):
      if modality not in each[0][1].curves:  # a text model beside others
        continue
      pairs = [(c.curves[modality], o.curves[modality]) for c, o in each]
      losses[modality] = {
        "final_loss": [o.final[modality] for _, o in each],
        # What others start from learns something else.
        "s": [final_step_ratio(c, o) for c, o in pairs if name not in starts],
        "curve": {
          "steps": pairs[0][1].steps.tolist(),
          "losses": [o.losses.tolist() for _, o in pairs],
        },
      }
    metrics = {
      metric: [o.metrics[metric] for _, o in each]
      for metric in comparison.metrics
      if all(metric in o.metrics for _, o in each)
    }
    results["experiments"][name] = {"losses": losses, "metrics": metrics}
  if seeds:
    known = {n for f in finished[seeds[0]].values() for n in f.metrics}
    for metric in comparison.metrics:
      if metric not in known:
        raise UserError(
          f"no run has {metric!r} of config.metrics{nearest(metric, known)}"
        )
  return results


def time_steps(comparison: Comparison, workdir: Path) -> dict[str, Any]:
  """Seconds of each experiment's step, all of them in turns in this process.

  Runs that train one after another cannot be compared: the machine changes.

  Args:
    comparison: its experiments are timed with their first seed.
    workdir: the folder of all runs, finished.

  Returns:
    name -> quartiles of "seconds" and of "over_control", JSON-ready.
  """
  # Their flags are not this program's.
  from experiments.benchmarks import timing
  from experiments.benchmarks.train_step import Case

  print("timing the steps in turns", flush=True)
  seed, names = comparison.seeds[0], comparison.experiments
  made = {n: experiment_of(comparison, n, seed, workdir) for n in names}
  cases = {n: Case(e) for n, e in made.items()}
  seconds = timing.interleaved(cases, repeats=_ROUNDS)
  over = timing.ratios(seconds, comparison.control)
  return {
    name: {
      "seconds": dataclasses.asdict(timing.Quartiles.of(times)),
      "over_control": dataclasses.asdict(over[name]),
    }
    for name, times in seconds.items()
  }


def _timed_before(workdir: Path) -> dict[str, Any] | None:
  """What `time_steps` gave at an earlier end of the same comparison."""
  try:
    content = json.loads((workdir / "comparison.json").read_text("utf-8"))
  except (OSError, ValueError):
    return None
  return content.get("seconds_per_step")


def write_results(
  comparison: Comparison, workdir: Path, timed: dict[str, Any] | None = None
) -> None:
  """Writes the table and the drawing of the seeds that are complete.

  Args:
    comparison: what is compared.
    workdir: the folder of all runs.
    timed: of `time_steps`; None while runs are missing.
  """
  results = results_of(comparison, workdir) | {"seconds_per_step": timed}
  if not results["seeds"]:
    return
  described = environment.describe()
  content = json.dumps(
    _without_infinity({**results, "environment": described}), indent=1
  )
  (workdir / "comparison.json").write_text(content + "\n", encoding="utf-8")
  (workdir / "comparison.md").write_text(
    markdown_of(results, described), encoding="utf-8"
  )
  draw(results).savefig(workdir / "comparison.svg")


def _without_infinity(value: Any) -> Any:
  """JSON has no inf: an s that was never reached becomes null."""
  if isinstance(value, dict):
    return {k: _without_infinity(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_without_infinity(v) for v in value]
  return None if isinstance(value, float) and math.isinf(value) else value


def run(comparison: Comparison, workdir: Path) -> int:
  """Trains what is missing, then prints and writes the table.

  Args:
    comparison: what is compared.
    workdir: the folder of all runs.

  Raises:
    UserError: different FLOPs a step, or whatever a run finds wrong.
  """
  if comparison.equal_flops:
    check_flops(comparison)
  workdir.mkdir(parents=True, exist_ok=True)
  if not train_all(comparison, workdir):
    print(f"stopped: {workdir}; the same command goes on from there")
    return 0
  timed = _timed_before(workdir) or time_steps(comparison, workdir)
  write_results(comparison, workdir, timed)
  results = results_of(comparison, workdir) | {"seconds_per_step": timed}
  head, *rows = table_of(results)
  table = Table(caption="mean (least to greatest) of the seeds")
  for i, name in enumerate(head):
    table.add_column(name, justify="right" if i else "left")
  for row in rows:
    table.add_row(*row)
  Console(width=max(100, Console().width)).print(table)
  first = comparison.seeds[0]
  page = report.compare(
    [
      folder
      for _, seed, folder in runs_of(comparison, workdir)
      if seed == first
    ],
    workdir / "comparison.html",
  )
  print(f"table and curves: {workdir}/comparison.md, .svg, .json; {page}")
  return 0


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the program and exits; `argv` defaults to the process's own."""
  argv = list(sys.argv if argv is None else argv)
  values = flags.FLAGS
  command_line.define_config(values, argv, lambda: Comparison)
  flags.adopt_module_key_flags(command_line)  # so that --help lists them
  debug = "--debug" in argv
  understood: list[tuple[Comparison, str]] = []

  def read(argv: Sequence[str]) -> tuple[Comparison, str]:
    def parse() -> int:
      comparison, workdir = command_line.parse_config(values, argv)
      if comparison is None:
        raise UserError(f"--config is missing; try {_EXAMPLE}")
      understood.append((comparison, workdir))
      return 0

    if code := guarded(parse, debug=debug):
      sys.exit(code)
    logging.set_verbosity(logging.WARNING)  # see experiments/run.py
    return understood[0]

  app.run(
    lambda given: guarded(
      lambda: run(given[0], Path(given[1]).expanduser()), debug=debug
    ),
    argv=argv,
    flags_parser=read,
  )


if __name__ == "__main__":
  main()
