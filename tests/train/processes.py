"""Processes of tests, forked from a server that has imported."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.train import fakes

# The server imports once; a child then starts in a fraction of a second. No
# backend exists before the fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
  [
    "tests.train.fakes",
    "fusionlab.train.loop",
    "fusionlab.data.opening",
    "fusionlab.analysis.summary",
    "fusionlab.generation.sampler",
    "experiments.run",
    "experiments.compare",
  ]
)
ROOT = Path(__file__).parents[2]


def command(
  folder: Path, module: str, *words: str, **environ: str
) -> subprocess.CompletedProcess:
  """Runs `python -m module words` in the repository, to its end.

  Args:
    folder: for what it prints.
    module: with a `__main__`.
    words: of the command line.
    environ: variables that differ from this process's.

  Returns:
    Exit code and what was printed, as text.
  """
  files = [folder / name for name in ("stdout.txt", "stderr.txt")]
  process = _CONTEXT.Process(
    target=_run_module, args=(module, words, files, environ)
  )
  process.start()
  process.join(300)
  if process.is_alive():
    process.kill()
    raise TimeoutError(f"{module} did not end: {files[1].read_text()}")
  return subprocess.CompletedProcess(
    [module, *words], process.exitcode, *(file.read_text() for file in files)
  )


def _run_module(module, words, files, environ) -> None:
  """What `python -m` does, printing to files."""
  sys.stdout, sys.stderr = (
    open(file, "w", buffering=1)  # noqa: SIM115
    for file in files
  )
  os.dup2(sys.stdout.fileno(), 1)
  os.dup2(sys.stderr.fileno(), 2)
  os.environ.update(environ)
  os.chdir(ROOT)
  sys.argv = [module, *words]
  sys.modules.pop(module, None)
  runpy.run_module(module, run_name="__main__", alter_sys=True)


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


def start_job(
  folder: Path, workdir: Path, count: int, flat, *, devices=1, only=None
):
  """Starts a job of several processes; output goes to <workdir>_<index>.txt.

  Args:
    folder: see `fakes.run_process`.
    workdir: of the run.
    count: processes.
    flat: see `fakes.experiment_of`.
    devices: of each process.
    only: index of a process -> its further options; `flat` changes its config.
  """
  fakes.experiment_of(folder)
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  job = []
  for index in range(count):
    log = workdir.parent / f"{workdir.name}_{index}.txt"
    options = dict((only or {}).get(index, {}))
    own = {**flat, **options.pop("flat", {})}
    job.append(
      _CONTEXT.Process(
        target=fakes.run_process,
        args=(folder, workdir, own, index, count, address, devices, log),
        kwargs=options,
      )
    )
    job[-1].start()
  return job


def end_job(job, timeout=60.0) -> list[int]:
  """Waits for a job's processes and returns their exit codes."""
  until = time.monotonic() + timeout
  for process in job:
    process.join(max(until - time.monotonic(), 0))
  late = [index for index, process in enumerate(job) if process.is_alive()]
  for index in late:
    job[index].kill()
    job[index].join()
  assert not late, f"processes {late} did not end within {timeout} s"
  return [process.exitcode for process in job]


def wait_for_rows(workdir: Path, count: int, process, timeout=90.0) -> None:
  """Waits until metrics.csv has some rows, or the process ended."""
  until = time.monotonic() + timeout
  while process.is_alive():
    path = workdir / "metrics.csv"
    if path.exists() and len(path.read_bytes().splitlines()) > count:
      return
    assert time.monotonic() < until, "no metrics in time"
    time.sleep(0.005)
