"""What a config costs, before anything is allocated: `--mode=summary`."""

import math

from rich.console import Console
from rich.table import Table

from fusionlab.analysis import parameters
from fusionlab.analysis.parameters import ParameterCount
from fusionlab.experiment import Experiment
from fusionlab.sharding.mesh import AXES
from fusionlab.tokenizers import load_tokenizers
from fusionlab.towers import SHARED


def render(experiment: Experiment) -> str:
  """Tables of parameters, FLOPs per token and bytes per device.

  Args:
    experiment: validated; its mesh sizes count as given, whatever devices are
      at hand. Where `fsdp` takes every device there is, bytes are those of all.

  Returns:
    Text for a terminal.

  Raises:
    UserError: a tokenizer file that cannot be read.
  """
  model, mesh = experiment.model, experiment.mesh
  vocab_size = model.vocab_size
  if not vocab_size:
    tokenizers = load_tokenizers(
      experiment.data.text_tokenizer, experiment.data.image_tokenizer
    )
    vocab_size = tokenizers.vocabulary.size
  counts = parameters.count(model, vocab_size)
  length = experiment.data.row_length

  table = Table(title=f"{model.kind}, untie='{model.untie}'")
  table.add_column("parameters")
  table.add_column("number", justify="right")
  for name, number in (
    ("total", counts.total),
    ("active per token", counts.active),
    ("embedding and output tables", counts.embedding),
    *((f"tower {name}", n) for name, n in counts.per_tower.items()),
    *((f"  frozen: {name}", n) for name, n in _frozen(experiment, counts)),
  ):
    table.add_row(name, f"{number:,}")

  work = Table()
  work.add_column("FLOPs per token")
  work.add_column("MFLOPs", justify="right")
  forward = model.forward_flops_per_token(vocab_size, length)
  for name, number in (("forward", forward), ("training step", 3 * forward)):
    work.add_row(name, f"{number / 1e6:,.1f}")
  rows = experiment.train.batch_size
  work.add_row(
    f"whole step ({rows:,} rows of {length:,})",
    f"{3 * forward * rows * length / 1e6:,.0f}",
  )

  memory = Table()
  every = mesh.preset != "cpu" and not mesh.fsdp
  memory.add_column("bytes of all devices" if every else "bytes per device")
  memory.add_column("MiB", justify="right")
  for name, number in state_bytes(experiment, counts).items():
    memory.add_row(name, f"{number / 2**20:,.1f}")
  shape = " x ".join(f"{axis} {getattr(mesh, axis) or 1}" for axis in AXES)
  memory.caption = f"mesh {shape}; activations are not counted"
  if every:
    memory.caption += "; --config.mesh.fsdp=N divides by N"

  console = Console(width=80, force_terminal=False)
  with console.capture() as capture:
    for part in (table, work, memory):
      console.print(part)
  return capture.get()


def state_bytes(
  experiment: Experiment, counts: ParameterCount
) -> dict[str, float]:
  """Bytes of the training state on one device, float32, split over `fsdp`.

  Args:
    experiment: its mesh and optimizer.
    counts: numbers of parameters.
  """
  each = 4 / max(1, experiment.mesh.fsdp)
  share = each * counts.total
  # Rows of the tables count as trained.
  trained = counts.total - sum(n for _, n in _frozen(experiment, counts))
  moments = 2 * each * trained
  if experiment.optimizer.kind == "muon":
    # One moment of a layer's matrix, two of what Adam keeps.
    moments -= each * (trained - counts.embedding - counts.norms)
  parts = {
    "parameters": share,
    "gradients": each * trained,
    "optimizer's moments": moments,
  }
  if experiment.optimizer.ema_decay:
    parts["moving average"] = share
  parts["sum"] = math.fsum(parts.values())
  return parts


def _frozen(
  experiment: Experiment, counts: ParameterCount
) -> list[tuple[str, int]]:
  """Parameters of each frozen tower, without its rows of the tables."""
  return [
    (name, counts.per_tower[name] - counts.embedding * (name == SHARED))
    for name in experiment.optimizer.freeze.split()
    if name in counts.per_tower
  ]
