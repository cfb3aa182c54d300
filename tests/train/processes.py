"""Training processes to be killed: forked from a server that has imported."""

import multiprocessing
import time
from pathlib import Path

from tests.train import fakes

# The server imports once; a child then starts in a fraction of a second. No
# backend exists before the fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
  ["tests.train.fakes", "fusionlab.train.loop", "fusionlab.data.opening"]
)


def start(folder: Path, workdir: Path, flat=None, **options):
  """Starts `train`; output goes to <folder>/log.txt."""
  fakes.experiment_of(folder)  # writes the tokenizers before the race
  process = _CONTEXT.Process(
    target=fakes.run_training,
    args=(folder, workdir, flat or {}),
    kwargs=options,
  )
  process.start()
  return process


def run(folder: Path, workdir: Path, flat=None, **options) -> int:
  """Runs `train` to its end and returns the exit code."""
  process = start(folder, workdir, flat, **options)
  process.join(120)
  return process.exitcode


def wait_for_rows(workdir: Path, count: int, process, timeout=90.0) -> None:
  """Waits until metrics.csv has some rows, or the process ended."""
  until = time.monotonic() + timeout
  while process.is_alive():
    path = workdir / "metrics.csv"
    if path.exists() and len(path.read_bytes().splitlines()) > count:
      return
    assert time.monotonic() < until, "no metrics in time"
    time.sleep(0.005)
