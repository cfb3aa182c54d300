"""What a compiled program does in one run: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, so a scan over layers
looks like one layer; here every loop counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

from fusionlab.analysis.collectives import (
  KINDS,
  Collective,
  read_collective,
)
from fusionlab.analysis.hlo_costs import (
  BOOKKEEPING,
  Traffic,
  convolution_flops,
  custom_call_cost,
  dot_flops,
  skipped_step,
)
from fusionlab.analysis.hlo_text import (
  Computation,
  Instruction,
  Module,
  parse,
)


@dataclasses.dataclass(frozen=True)
class Loop:
  """A while loop.

  Attributes:
    name: of the instruction.
    op_name: where the program says it comes from.
    trips: iterations each time; None where the text does not say, and the body
      is counted once.
    executions: how often the loop is entered in one run.
  """

  name: str
  op_name: str
  trips: int | None
  executions: int


@dataclasses.dataclass(frozen=True)
class Program:
  """One run of a compiled program on one device.

  Attributes:
    name: 'jit_train_step'.
    num_devices: partitions of the program.
    flops: of matrix products and convolutions (`hlo_costs`).
    flops_by_dtype: the same by the type of the left operand.
    bytes_accessed: read and written in main memory by top-level instructions;
      what stays in on-chip memory (TPU's layouts say so) costs nothing.
    collectives: each with its executions.
    loops: every while loop.
    uncounted: custom calls that state no FLOPs, by target or Pallas kernel ->
      how often they run.
  """

  name: str
  num_devices: int
  flops: float
  flops_by_dtype: Mapping[str, float]
  bytes_accessed: float
  collectives: tuple[Collective, ...]
  loops: tuple[Loop, ...]
  uncounted: Mapping[str, int]

  @property
  def unknown_loops(self) -> tuple[Loop, ...]:
    """Loops that count once because their trips are not known."""
    return tuple(loop for loop in self.loops if loop.trips is None)


class _Tally:
  """What one execution of a computation does; added up by callers."""

  def __init__(self):
    self.flops: Counter[str] = Counter()
    self.bytes = 0.0
    self.collectives: Counter[Collective] = Counter()
    self.loops: Counter[Loop] = Counter()
    self.uncounted: Counter[str] = Counter()

  def add(self, other: "_Tally", times: int = 1) -> None:
    self.bytes += times * other.bytes
    for key in ("flops", "collectives", "loops", "uncounted"):
      mine, theirs = getattr(self, key), getattr(other, key)
      for name, number in theirs.items():
        mine[name] += times * number


def analyse(text: str) -> Program:
  """Counts what one run of a program does on each device.

  Of a conditional the branch with the most FLOPs counts (then bytes).

  Args:
    text: `compiled.as_text()`.

  Raises:
    UserError: it cannot be read as an optimised HLO module.
  """
  module = parse(text)
  tally = _Walk(module).computation(module.entry)
  return Program(
    name=module.name,
    num_devices=module.num_partitions,
    flops=float(sum(tally.flops.values())),
    flops_by_dtype=dict(tally.flops),
    bytes_accessed=tally.bytes,
    collectives=tuple(
      dataclasses.replace(collective, executions=times)
      for collective, times in tally.collectives.items()
    ),
    loops=tuple(
      dataclasses.replace(loop, executions=times)
      for loop, times in tally.loops.items()
    ),
    uncounted=dict(tally.uncounted),
  )


class _Walk:
  """Counts computations, each once, from the ones they call."""

  def __init__(self, module: Module):
    self.module = module
    self.traffic = Traffic(module)
    self.computation = functools.cache(self._computation)

  def _computation(self, name: str, fused: bool = False) -> _Tally:
    tally = _Tally()
    computation = self.module.computations[name]
    for instruction in computation.instructions.values():
      self._count(tally, computation, instruction, fused)
      if not fused:
        tally.bytes += self.traffic.of(computation, instruction)
    return tally

  def _count(
    self,
    tally: _Tally,
    computation: Computation,
    instruction: Instruction,
    fused: bool,
  ) -> None:
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode == "while":
      self._loop(tally, computation, instruction)
    elif opcode == "conditional":
      branches = [self.computation(n) for n in _branches(instruction)]
      tally.add(max(branches, key=lambda t: (sum(t.flops.values()), t.bytes)))
    elif kind in KINDS:
      if not skipped_step(computation, instruction):
        if kind == "all-reduce" and fused and _sliced(computation, instruction):
          kind = "reduce-scatter"
        tally.collectives[self._collective(computation, instruction, kind)] += 1
    elif opcode in ("dot", "convolution"):
      left, right = computation.operand_shapes(instruction)[:2]
      if opcode == "convolution":
        flops = convolution_flops(instruction, left, right)
      else:
        size = math.prod(instruction.shapes[0].dims)
        contracting = instruction.numbers("lhs_contracting_dims")
        flops = dot_flops(size, left, contracting)
      tally.flops[left.dtype] += flops
    elif opcode == "custom-call" and instruction.target not in BOOKKEEPING:
      operands = computation.operand_shapes(instruction)
      flops, _ = custom_call_cost(instruction, operands)
      if flops is None:
        tally.uncounted[_call_name(instruction)] += 1
      else:
        tally.flops[operands[0].dtype if operands else ""] += flops
    for callee in instruction.callees:
      tally.add(self.computation(callee, fused or kind == "fusion"))

  def _loop(
    self, tally: _Tally, computation: Computation, instruction: Instruction
  ) -> None:
    trips = _trips(self.module, computation, instruction)
    loop = Loop(instruction.name, instruction.op_name, trips, 1)
    tally.loops[loop] += 1
    times = 1 if trips is None else trips
    tally.add(self.computation(instruction.attribute("body")), times)

  def _collective(
    self, computation: Computation, instruction: Instruction, kind: str
  ) -> Collective:
    return read_collective(
      instruction,
      computation.operand_shapes(instruction),
      self.module.num_partitions,
      kind=kind,
    )


def _call_name(instruction: Instruction) -> str:
  """The library's function, or the kernel that a Pallas call runs."""
  scope = instruction.op_name.split("/")
  return scope[-2] if scope[-1] == "pallas_call" else instruction.target


def _sliced(computation: Computation, instruction: Instruction) -> bool:
  """Whether only slices of a value are used, as in TPU's reduce-scatter."""
  users = computation.users[instruction.name]
  return bool(users) and all(
    user.opcode == "dynamic-slice"
    or (
      user.opcode in ("get-tuple-element", "bitcast")
      and _sliced(computation, user)
    )
    for user in users
  )


def _branches(instruction: Instruction) -> tuple[str, ...]:
  listed = instruction.braces("branch_computations")
  return listed or tuple(
    instruction.attribute(f"{which}_computation") for which in ("true", "false")
  )


def _trips(
  module: Module, computation: Computation, instruction: Instruction
) -> int | None:
  """Iterations of a while loop, or None.

  What XLA states counts; else a counter that the condition compares with a
  constant, that starts at a constant and that the body adds one to.
  """
  stated = re.search(
    r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)', instruction.attributes
  )
  if stated:
    return int(stated[1])
  condition = module.computations[instruction.attribute("condition")]
  body = module.computations[instruction.attribute("body")]
  compare = condition.instructions[condition.root]
  direction = compare.attribute("direction")
  if compare.opcode != "compare" or direction not in ("LT", "LE", "NE"):
    return None
  counter = _source(condition, compare.operands[0])
  limit = _constant(condition, compare.operands[1])
  start = _source(computation, instruction.operands[0])
  end = body.instructions[body.root]
  if counter.opcode != "get-tuple-element" or limit is None:
    return None
  if start.opcode != "tuple" or end.opcode != "tuple":
    return None
  index = int(counter.attribute("index"))
  first = _constant(computation, start.operands[index])
  step = _step(body, end.operands[index], index)
  if first is None or step is None or step <= 0:
    return None
  reach = limit - first + (direction == "LE")
  return max(0, -(-reach // step))


def _source(computation: Computation, name: str) -> Instruction:
  """What a value was before copies of it."""
  instruction = computation.instructions[name]
  while instruction.opcode in ("bitcast", "convert", "copy", "copy-done") or (
    instruction.opcode == "copy-start"
  ):
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _constant(computation: Computation, name: str) -> int | None:
  source = _source(computation, name)
  if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.literal):
    return int(source.literal)
  return None


def _step(body: Computation, name: str, index: int) -> int | None:
  add = _source(body, name)
  if add.opcode != "add":
    return None
  for counter, other in (add.operands, add.operands[::-1]):
    before = _source(body, counter)
    if before.opcode == "get-tuple-element" and (
      before.attribute("index") == str(index)
    ):
      return _constant(body, other)
  return None
