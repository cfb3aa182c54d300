"""What a config costs, before anything is allocated: `--mode=summary`."""

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from fusionlab.analysis import parameters
from fusionlab.analysis.devices import Chip, chip
from fusionlab.analysis.step_costs import (
  StepCosts,
  frozen_parameters,
  hiding_tokens,
  link_bytes_per_s,
  state_bytes,
  step_costs,
)
from fusionlab.experiment import Experiment
from fusionlab.sharding.mesh import AXES, PRESETS, mesh_shape
from fusionlab.tokenizers import load_tokenizers


def render(experiment: Experiment) -> str:
  """Tables of parameters, FLOPs per token and bytes per device.

  Args:
    experiment: validated; a preset that names a machine fills its axes, others
      count as given, whatever devices are at hand.

  Returns:
    Text for a terminal.

  Raises:
    UserError: a tokenizer file that cannot be read.
  """
  model = experiment.model
  vocabulary = load_tokenizers(
    experiment.data.text_tokenizer,
    experiment.data.image_tokenizer,
    latent_patch=experiment.data.latent_patch,
  ).vocabulary
  vocab_size = model.vocab_size or vocabulary.size
  counts = parameters.count(model, vocab_size, vocabulary.grids)
  length = experiment.data.row_length

  table = Table(title=f"{model.kind}, untie='{model.untie}'")
  table.add_column("parameters")
  table.add_column("number", justify="right")
  for name, number in (
    ("total", counts.total),
    ("active per token", counts.active),
    ("embedding and output tables", counts.embedding),
    *([("patches in and out", counts.patches)] if counts.patches else []),
    *((f"tower {name}", n) for name, n in counts.per_tower.items()),
    *(
      (f"  frozen: {name}", n)
      for name, n in frozen_parameters(experiment, counts)
    ),
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

  sizes = _mesh(experiment)
  shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
  memory = Table()
  every = experiment.mesh.preset == "auto" and not experiment.mesh.fsdp
  memory.add_column("bytes of all devices" if every else "bytes per device")
  memory.add_column("MiB", justify="right")
  for name, number in state_bytes(experiment, counts, sizes).items():
    memory.add_row(name, f"{number / 2**20:,.1f}")
  costs = step_costs(
    experiment,
    counts,
    vocab_size,
    sizes,
    chip=_chip(experiment),
    element=4 if model.compute_dtype == "float32" else 2,
  )
  memory.add_row("activations, about", f"{costs.activations / 2**20:,.1f}")
  memory.caption = f"mesh {shape}"
  if every:
    memory.caption += "; --config.mesh.fsdp=N divides by N"
  traffic = _traffic(experiment, costs, sizes, 3 * forward)

  console = Console(width=80, force_terminal=False)
  with console.capture() as capture:
    for part in (table, work, memory, *traffic):
      console.print(part)
  return capture.get()


def _mesh(experiment: Experiment) -> dict[str, int]:
  """Axis sizes; as given where the preset names no machine."""
  config = experiment.mesh
  if config.preset in PRESETS:
    return mesh_shape(config, PRESETS[config.preset].devices)
  return {axis: getattr(config, axis) or 1 for axis in AXES}


def _chip(experiment: Experiment) -> Chip | None:
  """The preset's; None where it names no machine."""
  preset = PRESETS.get(experiment.mesh.preset)
  return None if preset is None else chip(preset.chip)


def _traffic(
  experiment: Experiment,
  costs: StepCosts,
  sizes: Mapping[str, int],
  flops_per_token: float,
) -> list[Table | str]:
  """What a step sends and for how long, where several devices share it."""
  if not costs.traffic:
    return []
  wires = _chip(experiment)
  remat = experiment.model.remat
  if remat != "none":
    flops_per_token *= 4 / 3
  table = Table()
  table.add_column("a device sends in a step")
  table.add_column("along")
  table.add_column("MB", justify="right")
  if wires is not None:
    table.add_column("seconds at least", justify="right")
  for one in costs.traffic:
    cells = [one.kind, one.axes, f"{one.sent_bytes / 1e6:,.1f}"]
    if wires is not None:
      group = math.prod(sizes[axis] for axis in one.axes.split("+"))
      rate = link_bytes_per_s(wires, group)
      cells.append(f"{one.sent_bytes / rate:.4f}" if rate else "")
    table.add_row(*cells)
  towers = len(experiment.model.routed_towers.names)
  notes = [
    f"Along fsdp the matrices of all {towers} tower(s) are gathered, forward and"
    f" backward, whatever the tokens; the rest does not depend on towers."
  ]
  if wires is not None:
    seconds = costs.tokens * flops_per_token / wires.flops_per_s
    notes.append(
      f"Compute takes at least {seconds:.4f} s"
      f"{'' if remat == 'none' else ', recomputation included'}, for"
      f" {costs.tokens:,.0f} tokens a device."
    )
    least = hiding_tokens(costs, wires, sizes, flops_per_token)
    if least is not None:
      notes.append(
        f"From {least:,.0f} tokens a device on it takes longer than the traffic"
        f" along fsdp, which can then hide behind it."
      )
  return [table, *notes]
