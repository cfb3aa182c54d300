"""What a training step sends and keeps on a mesh, by formula, before compiling.

The formulas are those of the program that the rules make (sharding/rules.py), and
tests hold them to the compiled one. Bytes are one device's.
"""

import dataclasses
import math
from collections.abc import Mapping

from fusionlab.analysis.compiled import Memory, Report, Traffic
from fusionlab.analysis.devices import Chip, Switched
from fusionlab.analysis.parameters import ParameterCount
from fusionlab.analysis.roofline import Roofline
from fusionlab.experiment import Experiment
from fusionlab.towers import SHARED

_FULL = 4  # bytes of a float32
# Products of a layer whose backward pass sums over tensor-parallel devices: two
# forward (o, w_out), five backward (q, k, v, w_gate, w_in).
_SUMS_OF_A_LAYER = 7


@dataclasses.dataclass(frozen=True)
class StepCosts:
  """One device's share of a training step.

  Attributes:
    tokens: positions.
    traffic: what it sends, by kind and mesh axes.
    activations: bytes kept between the forward and the backward pass, and of the
      layer and the loss being worked on.
  """

  tokens: float
  traffic: tuple[Traffic, ...]
  activations: float


def step_costs(
  experiment: Experiment,
  counts: ParameterCount,
  vocab_size: int,
  mesh: Mapping[str, int],
  *,
  chip: Chip | None = None,
  element: int = 2,
) -> StepCosts:
  """Costs of one optimizer step.

  Under FSDP every device gathers all towers' matrices for the forward and for the
  backward pass of each microbatch, and sums their gradients once: K towers send K
  times what a dense model does, whatever the tokens. What tensor and context
  parallelism send does not depend on towers.

  Args:
    experiment: model, batch and rows.
    counts: of its model.
    vocab_size: ids V of the tables.
    mesh: axis -> size.
    chip: what the devices are. Where all is recomputed, XLA for GPUs gathers a
      matrix twice in the backward pass, for the output and for the gradient; for
      TPUs (and None) once.
    element: bytes of a number in the compute dtype.
  """
  model, train = experiment.model, experiment.train
  f, t, s = mesh["fsdp"], mesh["tensor"], mesh["sequence"]
  shards = mesh["data"] * f * mesh["expert"]
  tokens = train.batch_size * experiment.data.row_length / (shards * s)
  matrices = (counts.total - counts.embedding - counts.norms) / t
  tables = counts.embedding / t
  passes = train.accumulate
  # Gradients of matrices are summed in the compute dtype, of tables in float32.
  gradients = passes * (matrices * element + tables * _FULL)
  kept = (f - 1) / f
  layers, stream = model.num_layers, tokens * model.dim * element
  recomputed = 1 if model.remat == "none" else 2
  switched = chip is not None and isinstance(chip.interconnect, Switched)
  gathers = 3 if switched and model.remat == "full" else 2
  keys = 2 * tokens * s * model.kv_heads * model.width_of_head * element / t
  rest = {a: mesh[a] for a in ("data", "expert", "sequence") if mesh[a] > 1}
  others = math.prod(rest.values())
  found = [
    Traffic(
      "all-gather",
      "fsdp",
      passes * (gathers * layers * 7 * len(model.routed_towers.names) + 2),
      kept * passes * element * (gathers * matrices + tables),
    ),
    Traffic("reduce-scatter", "fsdp", passes, kept * gradients),
    Traffic(
      "all-reduce",
      "+".join(rest),
      passes,
      2 * (others - 1) / others * gradients / f,
    ),
    Traffic(
      "all-reduce",
      "tensor",
      passes * (layers * _SUMS_OF_A_LAYER + 2),
      2
      * (t - 1)
      / t
      * stream
      * (layers * (_SUMS_OF_A_LAYER + 2 * (recomputed - 1)) + 2),
    ),
    Traffic(
      "all-gather",
      "sequence",
      2 * layers * passes * recomputed,
      (s - 1) / s * keys * layers * recomputed,
    ),
    Traffic(
      "reduce-scatter",
      "sequence",
      2 * layers * passes,
      (s - 1) / s * keys * layers,
    ),
  ]
  return StepCosts(
    tokens=tokens,
    traffic=tuple(one for one in found if one.sent_bytes > 0),
    activations=_activations(
      experiment, tokens / passes, vocab_size, mesh, tables, element
    ),
  )


def _activations(
  experiment: Experiment,
  tokens: float,
  vocab_size: int,
  mesh: Mapping[str, int],
  tables: float,
  element: int,
) -> float:
  """Bytes of what a microbatch leaves for its backward pass, and works on."""
  model = experiment.model
  heads = model.num_heads * model.width_of_head
  groups = model.kv_heads * model.width_of_head
  wide = (2 * heads + 2 * groups + 3 * model.width_of_ffn) / mesh["tensor"]
  layer = tokens * element * (6 * model.dim + 2 * wide)
  stream = tokens * element * model.dim
  saved = layer if model.remat == "none" else stream
  chunk = getattr(experiment.objective, "chunk", experiment.data.row_length)
  length = experiment.data.row_length / mesh["sequence"]
  positions = tokens * min(1.0, chunk / length)
  logits = 3 * _FULL * positions * vocab_size / mesh["tensor"]
  # The output table in the compute dtype, its gradient in float32.
  table = tables / 2 * (element + _FULL)
  return model.num_layers * saved + max(2 * layer, logits + table) + 2 * stream


def state_bytes(
  experiment: Experiment,
  counts: ParameterCount,
  sizes: Mapping[str, int],
) -> dict[str, float]:
  """Bytes of the training state on one device, float32.

  Args:
    experiment: its optimizer.
    counts: numbers of parameters.
    sizes: of the mesh's axes: `fsdp` and `tensor` split the parameters.
  """
  each = 4 / (sizes["fsdp"] * sizes["tensor"])
  share = each * counts.total
  # Rows of the tables count as trained.
  trained = counts.total - sum(
    n for _, n in frozen_parameters(experiment, counts)
  )
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


def frozen_parameters(
  experiment: Experiment, counts: ParameterCount
) -> list[tuple[str, int]]:
  """Parameters of each frozen tower, without its rows of the tables."""
  return [
    (name, counts.per_tower[name] - counts.embedding * (name == SHARED))
    for name in experiment.optimizer.freeze.split()
    if name in counts.per_tower
  ]


def link_bytes_per_s(chip: Chip, group: int) -> float | None:
  """What a chip sends at most, all links at work; None where it is not known.

  Args:
    chip: of the table.
    group: devices that take part.
  """
  wires = chip.interconnect
  if wires is None:
    return None
  if isinstance(wires, Switched):
    if group <= wires.node_size:
      return wires.node_bytes_per_s
    # Members of a node share its network cards.
    return wires.network_bytes_per_s * wires.node_size
  return 2 * wires.dimensions * wires.link_bytes_per_s


def report_by_formula(
  experiment: Experiment,
  counts: ParameterCount,
  vocab_size: int,
  mesh: Mapping[str, int],
  chip: Chip,
  model_flops_per_token: float,
) -> Report:
  """A training step's report where no compiler for the chip is at hand.

  Args:
    experiment: model, batch, rows and optimizer.
    counts: of its model.
    vocab_size: ids V of the tables.
    mesh: axis -> size.
    chip: its peaks.
    model_flops_per_token: of a training step.
  """
  costs = step_costs(experiment, counts, vocab_size, mesh, chip=chip)
  state = state_bytes(experiment, counts, mesh)
  model_flops = costs.tokens * model_flops_per_token
  flops = model_flops * (1 if experiment.model.remat == "none" else 4 / 3)
  by_axes: dict[str, float] = {}
  for one in costs.traffic:
    group = math.prod(mesh[axis] for axis in one.axes.split("+"))
    rate = link_bytes_per_s(chip, group)
    if rate is not None:
      by_axes[one.axes] = by_axes.get(one.axes, 0.0) + one.sent_bytes / rate
  compute, sending = flops / chip.flops_per_s, math.fsum(by_axes.values())
  useful = model_flops / chip.flops_per_s
  temporaries = int(costs.activations + state["gradients"])
  arguments = int(state["sum"] - state["gradients"])
  return Report(
    step="training step",
    chip=chip.name,
    mesh=mesh,
    memory=Memory(
      arguments,
      0,
      temporaries,
      0,
      peak=arguments + temporaries,
      available=None if chip.hbm_bytes is None else int(chip.hbm_bytes),
    ),
    tokens=costs.tokens,
    flops=flops,
    model_flops=model_flops,
    traffic=costs.traffic,
    roofline=Roofline(
      compute=compute,
      memory=0.0,
      communication=sending,
      by_axes=by_axes,
      overlapped=max(compute, sending),
      serial=compute + sending,
      mfu_overlapped=useful / max(compute, sending),
      mfu_serial=useful / (compute + sending),
      limit="compute" if compute >= sending else "communication",
    ),
    not_counted={"memory traffic": 1},
    by_formula=True,
  )


def hiding_tokens(
  costs: StepCosts, chip: Chip, mesh: Mapping[str, int], flops_per_token: float
) -> float | None:
  """Tokens of a device from which the traffic of weights hides behind compute.

  Args:
    costs: of the step.
    chip: its peaks.
    mesh: axis -> size.
    flops_per_token: of the training step, recomputation included.

  Returns:
    The tokens; None where nothing is sent along `fsdp` or no link is known.
  """
  rate = link_bytes_per_s(chip, mesh["fsdp"])
  sent = sum(one.sent_bytes for one in costs.traffic if one.axes == "fsdp")
  if rate is None or not sent:
    return None
  return sent / rate * chip.flops_per_s / flops_per_token
