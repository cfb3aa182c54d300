"""Trains each tiny config, kills it with SIGKILL, resumes, generates.

Every training loss of the interrupted run must equal the uninterrupted run's, to
the last bit of what metrics.csv holds; the killed run's last checkpoint must draw
and write; and data that is chosen to fill the rows must do so.
"""

import csv
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

from fusionlab.data import open_data
from fusionlab.experiment import Experiment
from fusionlab.tokenizers import load_tokenizers

# Config -> what else its command says.
CONFIGS = {
  "configs/mot_chameleon.py": (),
  "configs/mot_transfusion.py": (),
  # Its few passages do not fill what pictures leave.
  "configs/lmfusion.py:tiny": ("--config.init.text_steps=4",),
}
FILLED = ("configs/mot_chameleon.py", "configs/mot_transfusion.py")
KILL_AFTER, LAST_STEP, TIMEOUT = 9, 14, 600
# Tokens over places of each tower; a plan that packs badly wastes the rest.
FILL = 0.97


def command(config: str, workdir: pathlib.Path) -> list[str]:
  """The command line of one run."""
  return [
    sys.executable,
    "-m",
    "experiments.run",
    f"--config={config}",
    f"--workdir={workdir}",
    "--config.train.log_every=1",
    "--config.train.eval_every=0",
    "--config.train.checkpoint_every=4",
    *CONFIGS[config],
  ]


def losses(workdir: pathlib.Path) -> dict[int, dict[str, str]]:
  """Training losses by step, as text."""
  path = workdir / "metrics.csv"
  if not path.exists():
    return {}
  with path.open(newline="", encoding="utf-8") as file:
    return {
      int(row["step"]): {k: v for k, v in row.items() if "train/loss" in k}
      for row in csv.DictReader(file)
      if row["step"].isdigit() and row.get("train/loss/text")
    }


def train_until(config: str, workdir: pathlib.Path, step: int) -> None:
  """Trains until the loss of `step` is on disk, then kills without mercy."""
  process = subprocess.Popen(command(config, workdir))
  deadline = time.monotonic() + TIMEOUT
  try:
    while max(losses(workdir), default=0) < step:
      if process.poll() is not None:
        sys.exit(f"error: the run ended before step {step}")
      if time.monotonic() > deadline:
        sys.exit(f"error: step {step} was not reached in {TIMEOUT} s")
      time.sleep(0.02)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  print(f"killed after step {max(losses(workdir))}", flush=True)


def generates(workdir: pathlib.Path) -> bool:
  """Draws a picture, and describes it; True where both files are there."""
  generate = [
    sys.executable,
    "-m",
    "experiments.run",
    "--mode=generate",
    f"--workdir={workdir}",
    "--prompt=red apple",
  ]
  subprocess.run([*generate, "--make=image", "--guidance=2"], check=True)
  picture = workdir / "generated" / "001" / "000_0.png"
  subprocess.run(
    [*generate, f"--image={picture}", "--max_new_tokens=8"], check=True
  )
  return (workdir / "generated" / "002" / "generated.txt").is_file()


def fills(config: str) -> dict[str, float]:
  """Tokens over places of each modality, in the first epoch."""
  get_config = runpy.run_path(config)["get_config"]
  experiment = Experiment.from_mapping(get_config().to_dict())
  tokenizers = load_tokenizers(image_path=experiment.data.image_tokenizer)
  data = open_data(
    experiment, tokenizers, group_rows=experiment.train.batch_size
  )
  full = data.train.plan(0).used.mean(axis=0) / data.layout_counts
  return dict(zip(data.vocabulary.modalities, full, strict=True))


def holds(config: str) -> bool:
  """Whether all that is said above is so of a config."""
  print(f"--- {config}", flush=True)
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder) / "whole"
    killed = pathlib.Path(folder) / "killed"
    train_until(config, whole, LAST_STEP)
    train_until(config, killed, KILL_AFTER)
    train_until(config, killed, LAST_STEP)
    expected, found = losses(whole), losses(killed)
    generated = generates(killed)
  differing = [
    step
    for step in range(1, LAST_STEP + 1)
    if step not in expected or expected[step] != found.get(step)
  ]
  for step in differing:
    print(f"step {step}: {expected.get(step)} became {found.get(step)}")
  print(f"{LAST_STEP - len(differing)} of {LAST_STEP} steps agree")
  full = fills(config) if config in FILLED else {}
  for name, fill in full.items():
    print(f"{name} places are {fill:.3f} full, at least {FILL}")
  filled = all(fill >= FILL for fill in full.values())
  return not differing and generated and filled


def main() -> int:
  """Returns 0 where all of it holds of every config."""
  failed = [config for config in CONFIGS if not holds(config)]
  print(f"failed: {', '.join(failed) or 'none'}")
  return int(bool(failed))


if __name__ == "__main__":
  sys.exit(main())
