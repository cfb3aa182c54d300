"""What the launch files are given in tests, and what they must start."""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable

from absl import flags

from experiments.command_line import Options, define_flags, parse

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SLURM, TPU_VM, GKE = "slurm.sbatch", "tpu_vm.sh", "gke.yaml"
RUN = {
  "CONFIG": "configs/mot_chameleon.py:tiny",
  "WORKDIR": "/shared/my runs/mot",
  "PRESET": "gpu_h100_64",
}
SLICE = {
  "TPU": "mot",
  "ZONE": "us-west4-a",
  "TYPE": "v5litepod-16",
  "RUNTIME": "v2-alpha-tpuv5-lite",
  "REPO": "/shared/fusionlab",
}
CLUSTER = {
  "NAME": "mot",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "4x4",
  "HOSTS": "4",
  "IMAGE": "example.com/fusionlab",
  "CLAIM": "shared",
}
OVERRIDE = "--config.model.towers=0, 0"


def bash_with(
  folder: pathlib.Path,
) -> Callable[..., subprocess.CompletedProcess]:
  """Returns what runs bash with fake commands in front of PATH."""
  fakes = folder / "bin"
  fakes.mkdir()

  def run(words, variables, **commands: str) -> subprocess.CompletedProcess:
    for name, script in commands.items():
      (fakes / name).write_text(f"#!/bin/bash\n{script}\n")
      (fakes / name).chmod(0o755)
    path = f"{fakes}:{os.environ['PATH']}"
    return subprocess.run(
      ["bash", *map(str, words)],
      env={"PATH": path, "T": str(folder), **variables},
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=20,
      check=False,
    )

  return run


def understood(words: list[str]) -> Options:
  """What experiments.run makes of a command that a launcher starts."""
  at = words.index("experiments.run")
  assert words[at - 1] == "-m"
  assert pathlib.Path(words[at - 2]).name == "python"
  values = flags.FlagValues()
  define_flags(values, words[at:])
  return parse(values, words[at:])


def check(words: list[str]) -> None:
  """The command trains RUN's config, in its workdir, with what was added."""
  options = understood(words)
  assert (options.mode, options.workdir) == ("train", RUN["WORKDIR"])
  assert options.experiment is not None
  assert options.experiment.mesh.preset == RUN["PRESET"]
  assert options.experiment.model.towers == (0, 0)
  assert options.experiment.model.dim == 192  # tiny


def write_status(folder: pathlib.Path, status: str, step: int) -> None:
  content = {"status": status, "step": step, "reason": ""}
  folder.mkdir(exist_ok=True)
  text = json.dumps(content, indent=2) + "\n"
  (folder / "status.json").write_text(text)
