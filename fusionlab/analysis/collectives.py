"""Collectives of a compiled program: who takes part, what moves, over which axes.

Bytes that each device sends are those of the bandwidth-optimal algorithms, with n
devices in a group (Thakur, Rabenseifner, Gropp, "Optimization of Collective
Communication Operations in MPICH", IJHPCA 2005; the same factors are nccl-tests'
bus bandwidth, its doc/PERFORMANCE.md): all-gather and reduce-scatter (n-1)/n of the
whole array, all-reduce twice that, all-to-all (n-1)/n of a device's own array, a
permute the array itself.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from fusionlab.analysis.hlo_text import Instruction, Shape
from fusionlab.errors import UserError

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\) )?\s*\{(.*?)\}")
_MESH_AXIS = re.compile(r"'?([^',=]+)'?=(\d+)")
_MESH_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_REF = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_EXPLICIT = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction and how often a run of the program executes it.

  Attributes:
    kind: a name of `KINDS`. TPU's fusion of an all-reduce and the slice of it
      that a device keeps is a 'reduce-scatter'.
    name: of the instruction.
    op_name: where the program says it comes from.
    dtypes: of the operands, each once.
    executions: in one run, loops counted in full.
    operand_bytes: payload of one device and execution.
    result_bytes: what one device has afterwards.
    group_size: devices that take part together; of a permute, 2.
    groups: device ids, one tuple per group; of a permute (source, target) pairs.
    use_global_device_ids: as printed; jax's programs have one replica, so ids
      are partitions either way.
  """

  kind: str
  name: str
  op_name: str
  dtypes: tuple[str, ...]
  executions: int
  operand_bytes: int
  result_bytes: int
  group_size: int
  groups: tuple[tuple[int, ...], ...]
  use_global_device_ids: bool

  @property
  def whole_bytes(self) -> int:
    """The larger of a device's payload and result: the array's whole size."""
    return max(self.operand_bytes, self.result_bytes)

  @property
  def sent_bytes(self) -> float:
    """Bytes that each device sends in one execution (formulas: module)."""
    n = self.group_size
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(self.operand_bytes)
    share = (n - 1) / n
    if self.kind == "all-reduce":
      return 2 * share * self.operand_bytes
    if self.kind.endswith("all-to-all"):
      return share * self.operand_bytes
    return share * self.whole_bytes

  @property
  def total_bytes(self) -> float:
    """Bytes that each device sends in one run of the program."""
    return self.executions * self.sent_bytes


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)


def _iota(shape: tuple[int, ...], order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_ints(order)) if order else ids


def _mesh_groups(found: re.Match[str]) -> np.ndarray:
  """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}`: over those axes."""
  sizes = {name: int(n) for name, n in _MESH_AXIS.findall(found[1])}
  dims = math.prod(sizes.values())
  if not found[2]:
    ids = np.arange(dims)
  elif iota := _MESH_IDS.fullmatch(found[2]):
    ids = _iota(_ints(iota[1]), iota[2])
  else:
    ids = np.asarray(_ints(found[2]))
  refs = _MESH_REF.findall(found[3])
  # An axis that is only partly used falls into (before, used, after).
  split, places = [], {}
  for axis, size in sizes.items():
    parts = sorted(
      (int(before), int(n)) for name, before, n in refs if name == axis and n
    )
    at = 1
    for before, n in parts or [(1, size)]:
      if before > at:
        split.append(before // at)
      places[axis, before if parts else 1] = len(split)
      split.append(n)
      at = before * n
    if at < size:
      split.append(size // at)
  inner = [places[name, int(before or 1)] for name, before, _ in refs]
  outer = [d for d in range(len(split)) if d not in inner]
  moved = ids.reshape(split).transpose(outer + inner)
  return moved.reshape(-1, math.prod(split[d] for d in inner))


def device_groups(
  attributes: str, num_devices: int
) -> tuple[tuple[int, ...], ...]:
  """Decodes `replica_groups=` or `source_target_pairs=` in any printed form.

  Explicit `{{0,1},{2,3}}`, iota `[2,4]<=[8]` and `[4,2]<=[2,4]T(1,0)`, and mesh
  `mesh['a'=2,'b'=4] {'b'}`.

  Args:
    attributes: what follows an instruction's operands.
    num_devices: of the program; groups that are not given are one of all.
  """
  key = re.search(r"(?:replica_groups|source_target_pairs)=", attributes)
  rest = attributes[key.end() :] if key else ""
  if iota := _IOTA.match(rest):
    groups = _iota(_ints(iota[2]), iota[3]).reshape(_ints(iota[1])).tolist()
  elif mesh := _MESH.match(rest):
    groups = _mesh_groups(mesh).tolist()
  elif explicit := _EXPLICIT.match(rest):
    groups = [_ints(g) for g in re.findall(r"\{([\d,]*)\}", explicit[1])]
  elif rest:
    raise UserError(f"unknown form of device groups in HLO: {rest[:80]!r}")
  else:
    groups = []
  return tuple(tuple(g) for g in groups) or (tuple(range(num_devices)),)


def read_collective(
  instruction: Instruction,
  operands: tuple[Shape, ...],
  num_devices: int,
  *,
  kind: str,
) -> Collective:
  """Describes one execution of a collective.

  Args:
    instruction: it or its start.
    operands: shapes of the payload.
    num_devices: of the program.
    kind: a name of `KINDS`.
  """
  groups = device_groups(instruction.attributes, num_devices)
  size = max(len(group) for group in groups)
  payload = sum(shape.bytes for shape in operands)
  result = payload
  if kind == "all-gather":
    result = payload * size
  elif kind == "reduce-scatter":
    result = payload // size
  elif kind == "ragged-all-to-all":
    # Operands are input, output and four arrays of offsets and sizes.
    payload, result = operands[0].bytes, operands[1].bytes
  return Collective(
    kind=kind,
    name=instruction.name,
    op_name=instruction.op_name,
    dtypes=tuple(dict.fromkeys(shape.dtype for shape in operands)),
    executions=1,
    operand_bytes=payload,
    result_bytes=result,
    group_size=size,
    groups=groups,
    use_global_device_ids=(
      instruction.attribute("use_global_device_ids") == "true"
    ),
  )


def mesh_axes(collective: Collective, axes: Mapping[str, int]) -> str:
  """Names the mesh axes along which a collective's groups run.

  Args:
    collective: its groups.
    axes: name -> size, outermost first; device ids are row-major in them, as
      the partitions of a program on a `jax.sharding.Mesh` are.

  Returns:
    'fsdp', 'data+fsdp', …; '' where every device is alone. Groups that leave out
    devices of an axis are marked: 'fsdp[2 of 8]', or 'data+fsdp[4 of 16]' where
    it cannot be said of one axis. A permute names the axes along which it moves.

  Raises:
    UserError: ids that are not in the mesh.
  """
  names, sizes = tuple(axes), tuple(axes.values())
  total = math.prod(sizes)
  if max(max(group) for group in collective.groups if group) >= total:
    raise UserError(
      f"{collective.name} has device ids beyond the {total} devices of a mesh of"
      f" {dict(axes)}"
    )
  varying: set[int] = set()
  for group in collective.groups:
    places = np.stack(np.unravel_index(np.asarray(group), sizes))
    moves = (places != places[:, :1]).any(axis=1)
    varying |= set(np.flatnonzero(moves).tolist())
  found = sorted(varying)
  label = "+".join(names[i] for i in found)
  spanned = math.prod(sizes[i] for i in found)
  if collective.kind == "collective-permute" or not found:
    return label
  if collective.group_size == spanned:
    return label
  return f"{label}[{collective.group_size} of {spanned}]"
