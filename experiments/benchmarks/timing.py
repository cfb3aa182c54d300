"""Interleaved timing: everything compared runs in one process, in turns."""

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.run import guarded
from fusionlab.errors import UserError
from fusionlab.train import environment

flags.DEFINE_integer("repeats", 10, "rounds of the timing", lower_bound=1)
flags.DEFINE_integer("seed", 0, "of the data and of the order of the timing")
flags.DEFINE_bool("json", False, "print the result as one last line of JSON")


@dataclasses.dataclass(frozen=True)
class Quartiles:
  """A median and the quartiles around it."""

  low: float
  median: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Quartiles":
    """Of at least one value."""
    if len(values) == 1:
      return cls(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, method="inclusive")
    return cls(low, median, high)

  @property
  def spread(self) -> str:
    """The quartiles, for a table."""
    return f"{self.low:.3f} to {self.high:.3f}"

  def __str__(self) -> str:
    return f"{self.median:.3f} ({self.spread})"


def temporaries_mib(compiled: Any) -> float:
  """MiB of a compiled program's temporaries.

  Args:
    compiled: a `jax.stages.Compiled`.
  """
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def interleaved(
  functions: Mapping[str, Callable[[], Any]], *, repeats: int, seed: int = 0
) -> dict[str, list[float]]:
  """Times functions in turns, in a new random order each time round.

  A machine's mood then falls on all of them alike, and ratios are taken within
  a round. Each function is called twice before, which is not counted.

  Args:
    functions: calls to time; what they return is waited for.
    repeats: rounds.
    seed: of the orders.

  Returns:
    Seconds of each function, by round.
  """
  order = list(functions)
  shuffle = random.Random(seed).shuffle
  seconds: dict[str, list[float]] = {name: [] for name in order}
  console = Console(stderr=True)
  with Progress(console=console, disable=not console.is_terminal) as progress:
    task = progress.add_task("timing", total=len(order) * (repeats + 2))
    for turn in range(-2, repeats):
      shuffle(order)
      for name in order:
        start = time.perf_counter()
        jax.block_until_ready(functions[name]())
        if turn >= 0:
          seconds[name].append(time.perf_counter() - start)
        progress.advance(task)
  return seconds


def ratios(
  seconds: Mapping[str, Sequence[float]], base: str
) -> dict[str, Quartiles]:
  """Each function's time over the base's of the same round."""
  return {
    name: Quartiles.of(
      [t / b for t, b in zip(times, seconds[base], strict=True)]
    )
    for name, times in seconds.items()
  }


def program(run: Callable[[Sequence[str]], None]) -> None:
  """Runs a benchmark as a command line; a user's mistake is one line.

  Args:
    run: takes the words that are no flag of the benchmark's own.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
      raise UserError(str(error)) from error

  def read(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    if code := guarded(lambda: words.extend(parse(argv)) or 0):
      sys.exit(code)
    return words

  # absl's own default is INFO, where JAX tells of every backend it lacks.
  logging.set_verbosity(logging.WARNING)
  app.run(
    lambda words: guarded(
      lambda: run(words[1:]) or 0, interrupted="nothing was kept"
    ),
    flags_parser=read,
  )


def no_words(words: Sequence[str]) -> None:
  """Raises UserError where a benchmark is given what it does not know."""
  if words:
    raise UserError(f"{words[0]!r} is not a flag here; --help lists them")


def report(table: Table, result: Mapping[str, Any]) -> None:
  """Prints a table, where it was measured and, with `--json`, one last line.

  Args:
    table: for people.
    result: JSON-ready; device, versions and commit are added.
  """
  where = environment.describe()
  device = where["devices"]
  jax_version = where["packages"]["jax"]
  commit = where["commit"] or "no commit"
  console = Console(width=100, highlight=False)
  console.print(table)
  console.print(
    f"{device['count']} x {device['kind']}, {where['host']['cpus']} CPU cores,"
    f" jax {jax_version}, Python {where['python']}, commit {commit[:9]}"
  )
  if flags.FLAGS.json:
    print(json.dumps({**result, "environment": where}))
