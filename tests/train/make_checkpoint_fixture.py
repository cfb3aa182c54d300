"""Writes fixtures/checkpoint_v1; see test_checkpoint for why only once."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fusionlab.train import checkpoint
from fusionlab.train.optimizer import named_leaves
from tests.train.test_checkpoint import FIXTURE, Run


def main() -> None:
  """Saves a tiny state and notes what a reader must find in it."""
  if FIXTURE.exists():
    raise SystemExit(f"{FIXTURE} exists; it is kept as it is")
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    run = Run(
      folder,
      optimizer__ema_decay=0.9,
      model__num_layers=1,
      model__dim=8,
      model__num_heads=1,
      model__ffn_dim=8,
    )
    run.forget_paths()
    run.save(folder / "checkpoints", [7])
    shutil.copytree(folder / "checkpoints" / "7", FIXTURE)
  loaded = checkpoint.load(FIXTURE)
  said = {
    "step": loaded.step,
    "red apple": loaded.tokenizers.text.encode("red apple"),
    "absolute_sums": {
      path: float(np.abs(np.asarray(leaf, np.float64)).sum())
      for path, leaf in named_leaves(loaded.params).items()
    },
  }
  path = FIXTURE.parent / f"{FIXTURE.name}.json"
  path.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
  main()
