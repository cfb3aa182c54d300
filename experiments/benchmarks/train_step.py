r"""A whole training step of any config: tokens/s, MFU, data wait, memory.

  python -m experiments.benchmarks.train_step --config=configs/mot_chameleon.py
  python -m experiments.benchmarks.train_step --compare \
      --config=configs/mot_chameleon.py \
      "--config=configs/mot_chameleon.py --config.model.untie=''"

The step is the one that training runs, on its real data through its real loader,
with the optimizer. `--compare` takes several configs, each with its overrides in
quotes, and runs their steps in turns in one process; the first one is the base.
Data wait is the share of the time in which the step waits for a batch (with
`--compare` a loader works on while the other steps run: measure it alone). Memory is
what the compiled step needs (arguments and temporaries) and, where the device keeps
count, its peak over the whole process.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from rich.table import Table

from experiments import command_line
from experiments.benchmarks import timing
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.sharding.batches import place_batch
from fusionlab.sharding.mesh import make_mesh
from fusionlab.train import workdir as workdirs
from fusionlab.train.setup import build, build_steps, default_group_rows

flags.adopt_module_key_flags(timing)  # so that --help lists them
_COMPARE = flags.DEFINE_bool(
  "compare", False, "take several configs, in quotes"
)


class Case:
  """A config's compiled step, its state and its batches."""

  def __init__(self, experiment: Experiment):
    mesh = make_mesh(experiment.mesh)
    experiment = workdirs.resolve(
      experiment, default_group_rows(experiment, mesh)
    )
    self.setup = build(experiment, mesh=mesh)
    steps = build_steps(self.setup)
    self._batches = self.setup.data.train.iterate(0)
    self._state = steps.init()
    batch = place_batch(next(self._batches), mesh)
    start = time.perf_counter()
    jitted: Any = steps.train_step
    self._step = jitted.lower(self._state, batch).compile()
    self.compile_s = time.perf_counter() - start
    self.waits: list[float] = []
    self.tokens: list[int] = []

  def __call__(self) -> None:
    """Runs the next step and waits for its metrics."""
    start = time.perf_counter()
    batch = next(self._batches)
    self.waits.append(time.perf_counter() - start)
    self._state, metrics = self._step(
      self._state, place_batch(batch, self.setup.mesh)
    )
    self.tokens.append(int(jax.device_get(metrics["tokens"])))

  def result(self, seconds: Sequence[float]) -> dict[str, Any]:
    """JSON-ready figures of the rounds that took these seconds."""
    waits, tokens = self.waits[-len(seconds) :], self.tokens[-len(seconds) :]
    rate = sum(tokens) / sum(seconds)
    flops = self.setup.train_flops_per_token * rate
    peak = self.setup.peak_flops
    return {
      "seconds": dataclasses.asdict(timing.Quartiles.of(seconds)),
      "tokens_per_s": rate,
      "model_flops_per_s": flops,
      "mfu": flops / peak if peak else None,
      "data_wait": sum(waits) / sum(seconds),
      "compile_s": self.compile_s,
      "arguments_mib": self._step.memory_analysis().argument_size_in_bytes
      / 2**20,
      "temporaries_mib": timing.temporaries_mib(self._step),
      "device_peak_mib": _device_peak_mib(),
    }


def _device_peak_mib() -> float | None:
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return None if peak is None else peak / 2**20


def read_config(words: Sequence[str]) -> Experiment:
  """The experiment that `experiments.run` would train with these words.

  Raises:
    UserError: whatever is wrong with them.
  """
  argv = [sys.argv[0], *words]
  values = flags.FlagValues()
  command_line.define_flags(values, argv)
  experiment = command_line.parse(values, argv).experiment
  if experiment is None:
    raise UserError("--config is missing")
  return experiment


def run(words: Sequence[str]) -> None:
  """Measures and prints.

  Args:
    words: what stands on the command line beside this program's own flags.
  """
  each = words if _COMPARE.value else [shlex.join(words)]
  if _COMPARE.value and len(set(each)) < 2:
    raise UserError(
      "--compare takes two or more different configs, each with its overrides"
      " in quotes"
    )
  try:
    named = {word: read_config(shlex.split(word)) for word in each}
  except ValueError as error:
    raise UserError(f"a quoted config cannot be read: {error}") from error
  cases = {name: Case(experiment) for name, experiment in named.items()}
  seconds = timing.interleaved(
    cases, repeats=flags.FLAGS.repeats, seed=flags.FLAGS.seed
  )
  over = timing.ratios(seconds, next(iter(cases)))
  results = {name: case.result(seconds[name]) for name, case in cases.items()}

  table = Table(title="training step")
  table.add_column("")
  for i in range(len(cases)):
    table.add_column(chr(ord("A") + i), justify="right")
  lines = {
    "seconds": lambda r: f"{r['seconds']['median']:.3f}",
    "  quartiles": lambda r: timing.Quartiles(**r["seconds"]).spread,
    "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
    "model GFLOP/s": lambda r: f"{r['model_flops_per_s'] / 1e9:,.1f}",
    "MFU": lambda r: "unknown peak" if r["mfu"] is None else f"{r['mfu']:.3f}",
    "data wait": lambda r: f"{r['data_wait']:.2%}",
    "compile s": lambda r: f"{r['compile_s']:.1f}",
    "state and batch MiB": lambda r: f"{r['arguments_mib']:,.0f}",
    "temporaries MiB": lambda r: f"{r['temporaries_mib']:,.0f}",
    "device peak MiB": lambda r: (
      "not told"
      if r["device_peak_mib"] is None
      else f"{r['device_peak_mib']:,.0f}"
    ),
  }
  for name, show in lines.items():
    table.add_row(name, *map(show, results.values()))
  if len(cases) > 1:
    table.add_row("time over A", *(f"{r.median:.3f}" for r in over.values()))
    table.add_row("  quartiles", *(r.spread for r in over.values()))
    table.caption = "\n".join(
      f"{chr(ord('A') + i)}: {name}" for i, name in enumerate(cases)
    )
  for name, ratio in over.items():
    results[name]["time_over_first"] = dataclasses.asdict(ratio)
  timing.report(
    table,
    {
      "benchmark": "train_step",
      "cases": results,
      "repeats": flags.FLAGS.repeats,
      "seed": flags.FLAGS.seed,
    },
  )


if __name__ == "__main__":
  timing.program(run)
