"""What a compiled step needs and costs on its chips: memory, work, traffic, time."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from fusionlab.analysis import hlo
from fusionlab.analysis.collectives import mesh_axes
from fusionlab.analysis.devices import Chip, Switched
from fusionlab.analysis.roofline import Roofline, estimate, places_of
from fusionlab.errors import UserError
from kernels_pallas.attention import recorded_choices

# "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.I)
_TAKEN = 0.75  # of a GPU's memory, by jax unless it is told otherwise
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device's memory.

  Attributes:
    arguments: what the step is given: state and batch, or parameters and cache.
    outputs: what it returns and does not write over its arguments.
    temporaries: what exists in between.
    program: the code.
    peak: their sum; of a step that does not fit, what the compiler says.
    available: what a program can have; None where the chip is not known.
  """

  arguments: int
  outputs: int
  temporaries: int
  program: int
  peak: int
  available: int | None

  @property
  def fits(self) -> bool | None:
    """Whether it fits; None where nothing is known of the chip."""
    return None if self.available is None else self.peak <= self.available


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind along the same mesh axes, of one step.

  Attributes:
    kind: "all-gather", "reduce-scatter", …
    axes: "fsdp", "data+fsdp", …
    executions: how often.
    sent_bytes: that each device sends.
  """

  kind: str
  axes: str
  executions: int
  sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Report:
  """One step on one mesh.

  Attributes:
    step: its name.
    chip: its name; "" where it is not in the table.
    mesh: axis -> size.
    memory: of one device.
    tokens: positions of one device and step.
    flops: of one device and step, recomputation included.
    model_flops: the same by the model's own formula, recomputation left out.
    hbm_bytes: read and written by one device in a step: an upper bound.
    traffic: collectives, the largest first.
    roofline: bounds of the time; None where the chip is not known.
    not_counted: what the figures leave out -> how often it runs.
    notes: what else must be known to read them, a sentence each.
    by_formula: whether the figures are `fusionlab.analysis.step_costs`' and no
      compiler's.
  """

  step: str
  chip: str
  mesh: Mapping[str, int]
  memory: Memory
  tokens: float
  flops: float = 0.0
  model_flops: float = 0.0
  hbm_bytes: float = 0.0
  traffic: tuple[Traffic, ...] = ()
  roofline: Roofline | None = None
  not_counted: Mapping[str, int] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  by_formula: bool = False

  def to_json(self) -> dict[str, Any]:
    """Everything as JSON's types, with the verdict."""
    return dataclasses.asdict(self) | {
      "mesh": dict(self.mesh),
      "fits": self.memory.fits,
    }


def compile_report(
  step: str,
  lower: Callable[[], jax.stages.Lowered],
  mesh: Mesh,
  chip: Chip | None,
  *,
  tokens: float,
  model_flops: float,
  kernel_flops: Mapping[str, float],
  notes: tuple[str, ...] = (),
) -> Report:
  """Lowers and compiles a step, and reads what came out.

  Args:
    step: its name.
    lower: lowers the step; what attention chooses is noted.
    mesh: its devices, which may be absent.
    chip: what they are; None where it is not known.
    tokens: positions of one device and step.
    model_flops: of one device and step, by the model's formula.
    kernel_flops: part of a kernel's name -> FLOPs of one run of it on a device,
      for kernels that do not state them.
    notes: of the report.

  Raises:
    UserError: a compiler that does not show its programs, or lacks a part.
    jax.errors.JaxRuntimeError: what the compiler refuses, but for a lack of
      memory, which is a verdict.
  """
  with recorded_choices() as choices:
    lowered = lower()
  common = {
    "step": step,
    "chip": "" if chip is None else chip.name,
    "mesh": dict(mesh.shape),
    "tokens": tokens,
    "model_flops": model_flops,
    "notes": (*notes, *choices),
  }
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "No PTX compilation provider" in str(error):
      raise UserError(
        "XLA compiles for GPUs with ptxas, and there is none: pip install"
        " nvidia-cuda-nvcc nvidia-nvvm"
      ) from error
    memory = _too_much(str(error))
    if memory is None:
      raise
    return Report(**common, memory=memory)
  text = compiled.as_text()
  if text is None:
    raise UserError(f"the {step} compiled, but its program cannot be read here")
  program = hlo.analyse(text)
  flops, left = program.flops, Counter(program.uncounted)
  for name, runs in program.uncounted.items():
    for part, each in kernel_flops.items():
      if part in name:
        flops += runs * each
        del left[name]
        break
  for loop in program.unknown_loops:
    left[f"loop {loop.name}, counted once"] += loop.executions
  memory = _memory(compiled, chip)
  common["notes"] += _preallocated(memory, chip)
  return Report(
    **common,
    memory=memory,
    flops=flops,
    hbm_bytes=program.bytes_accessed,
    traffic=_traffic(program, mesh),
    roofline=_roofline(program, flops, model_flops, chip, mesh),
    not_counted=dict(left),
  )


def _memory(compiled: Any, chip: Chip | None) -> Memory:
  stats = compiled.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  parts = (
    stats.argument_size_in_bytes,
    outputs,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
  )
  limit = None if chip is None or chip.hbm_bytes is None else chip.hbm_bytes
  return Memory(
    *parts,
    peak=sum(parts),
    available=None if limit is None else int(limit),
  )


def _preallocated(memory: Memory, chip: Chip | None) -> tuple[str, ...]:
  """Says so where a GPU has room, but not in what jax takes of it by itself."""
  if chip is None or not isinstance(chip.interconnect, Switched):
    return ()
  limit = memory.available or 0
  if not _TAKEN * limit < memory.peak <= limit:
    return ()
  return (
    f"jax takes {_TAKEN:.0%} of a GPU's memory, which is less than the peak: set"
    f" XLA_PYTHON_CLIENT_MEM_FRACTION",
  )


def _too_much(message: str) -> Memory | None:
  """What the compiler says of a program that does not fit."""
  found = _USED.search(message)
  if found is None:
    return None
  used, unit, limit, limit_unit = found.groups()
  peak = int(float(used) * _UNITS[unit.upper()])
  available = int(float(limit) * _UNITS[limit_unit.upper()])
  return Memory(0, 0, 0, 0, peak, available)


def _traffic(program: hlo.Program, mesh: Mesh) -> tuple[Traffic, ...]:
  sent: dict[tuple[str, str], float] = {}
  runs: Counter[tuple[str, str]] = Counter()
  for collective in program.collectives:
    if collective.group_size > 1:
      key = collective.kind, mesh_axes(collective, dict(mesh.shape))
      sent[key] = sent.get(key, 0.0) + collective.total_bytes
      runs[key] += collective.executions
  return tuple(
    Traffic(*key, runs[key], total)
    for key, total in sorted(sent.items(), key=lambda item: -item[1])
  )


def _roofline(
  program: hlo.Program,
  flops: float,
  model_flops: float,
  chip: Chip | None,
  mesh: Mesh,
) -> Roofline | None:
  if chip is None or chip.hbm_bytes_per_s is None:
    return None
  devices = list(mesh.devices.flat)
  return estimate(
    flops=flops,
    hbm_bytes=program.bytes_accessed,
    collectives=program.collectives,
    chip=chip,
    axes=dict(mesh.shape),
    places=places_of(devices, chip),
    model_flops=model_flops,
  )


def render(report: Report) -> str:
  """The report as text for a terminal.

  Args:
    report: of `compile_report`.
  """
  shown = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items())
  parts: list[Any] = []
  memory = Table()
  memory.add_column("memory of a device")
  memory.add_column("GiB", justify="right")
  held = report.memory
  if held.arguments:
    for name in ("arguments", "outputs", "temporaries", "program"):
      memory.add_row(name, f"{getattr(held, name) / 2**30:.2f}")
  memory.add_row("peak", f"{held.peak / 2**30:.2f}")
  if held.available is not None:
    memory.add_row("available", f"{held.available / 2**30:.2f}")
    verdict = "fits" if held.fits else "does not fit"
    memory.add_row("verdict", verdict)
  parts.append(memory)
  if report.hbm_bytes or report.by_formula:
    parts += [_work_table(report), _traffic_table(report)]
  console = Console(width=80, force_terminal=False)
  with console.capture() as capture:
    console.print(f"{report.step}: {report.chip or 'host'}, {shown}")
    if report.by_formula:
      console.print(
        "Figures by formula: lowered for this platform, which nothing here"
        " compiles for."
      )
    for part in parts:
      console.print(part)
    for note in report.notes:
      console.print(note, markup=False, highlight=False, soft_wrap=True)
    for name, runs in report.not_counted.items():
      console.print(f"not in the figures: {name}, {runs:,} times")
  return capture.get()


def _work_table(report: Report) -> Table:
  table = Table()
  table.add_column("a device and step")
  table.add_column("", justify="right")
  table.add_column("seconds", justify="right")
  line = report.roofline
  seconds = ("", "", "") if line is None else (
    f"{line.compute:.4f}", f"{line.memory:.4f}", f"{line.communication:.4f}"
  )  # fmt: skip
  sent = sum(t.sent_bytes for t in report.traffic)
  table.add_row("tokens", f"{report.tokens:,.0f}", "")
  table.add_row("model TFLOP", f"{report.model_flops / 1e12:,.3f}", "")
  table.add_row("TFLOP", f"{report.flops / 1e12:,.3f}", seconds[0])
  if report.hbm_bytes:
    table.add_row(
      "memory traffic, GB, at most",
      f"{report.hbm_bytes / 1e9:,.2f}",
      seconds[1],
    )
  table.add_row("sent, GB", f"{sent / 1e9:,.3f}", seconds[2])
  if line is not None:
    table.add_section()
    for name, total, mfu in (
      ("all at the same time", line.overlapped, line.mfu_overlapped),
      ("one after another", line.serial, line.mfu_serial),
    ):
      table.add_row(name, f"MFU {mfu:.0%}", f"{total:.4f}")
    table.caption = f"limited by {line.limit}, at the chip's peaks"
  return table


def _traffic_table(report: Report) -> Table:
  table = Table()
  table.add_column("collective")
  table.add_column("along")
  for name in ("times", "MB sent", "seconds along"):
    table.add_column(name, justify="right")
  for traffic in report.traffic:
    line = report.roofline
    along = "" if line is None else f"{line.by_axes[traffic.axes]:.4f}"
    table.add_row(
      traffic.kind,
      traffic.axes,
      f"{traffic.executions:,}",
      f"{traffic.sent_bytes / 1e6:,.1f}",
      along,
    )
  if not report.traffic:
    table.add_row("none", "", "", "", "")
  return table
