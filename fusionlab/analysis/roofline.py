"""How long a step takes at least, from what it computes, moves and sends.

Three times, each at the chip's peak: FLOPs, bytes of main memory, and bytes over
the links. If all overlapped perfectly the longest would be the step's; if nothing
overlapped, their sum. Neither knows latency, kernels below peak, or the host.

Links, after Austin et al., "How to Scale Your Model" (chapters 3 and 12):

- Torus: a group that fills a box of chips uses the links along each of the box's
  dimensions at once, in both directions where the dimension is a ring and in one
  where it is a line (an end must get everything through one link). Groups that
  interleave along a dimension share its links. A group that is no box is taken as
  a line on one link. All-to-all is bound by the box's middle, n/4 of a device's
  array crossing it for a dimension of n chips, and a permute by the busiest link
  when each message goes the short way, one dimension after the other.
- Switches: inside a node a device sends at its full rate. Between nodes the members
  that share a node share their network cards, one for each GPU, and the work
  inside the node overlaps it.
- Collectives run one after another.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fusionlab.analysis.collectives import Collective, mesh_axes
from fusionlab.analysis.devices import Chip, Switched, Torus
from fusionlab.errors import UserError

Places = Int[np.ndarray, "devices dimensions"]


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Bounds of a step's time, in seconds.

  Attributes:
    compute, memory: at the chip's peak.
    communication: of all collectives, one after another.
    by_axes: mesh axes ('fsdp', 'data+fsdp') -> seconds of their collectives.
    overlapped: the longest of the three, as if all ran at once.
    serial: their sum, as if nothing did.
    mfu_overlapped, mfu_serial: model FLOPs over what the chip could do in that
      time.
    limit: what is longest: 'compute', 'memory' or 'communication'.
  """

  compute: float
  memory: float
  communication: float
  by_axes: Mapping[str, float]
  overlapped: float
  serial: float
  mfu_overlapped: float
  mfu_serial: float
  limit: str


def places_of(devices: Sequence[Any], chip: Chip) -> Places:
  """Where devices are: coordinates in the torus, or the number of the node.

  Args:
    devices: `mesh.devices.flat`.
    chip: of all of them. GPUs are taken to fill nodes in the order of their ids.
  """
  if isinstance(chip.interconnect, Switched):
    size = chip.interconnect.node_size
    return np.asarray([[device.id // size] for device in devices])
  return np.asarray([device.coords for device in devices])


def estimate(
  *,
  flops: float,
  hbm_bytes: float,
  collectives: Sequence[Collective],
  chip: Chip,
  axes: Mapping[str, int],
  places: Places,
  model_flops: float | None = None,
) -> Roofline:
  """Bounds the time of a step.

  Args:
    flops: of one device and step, recomputation included.
    hbm_bytes: read and written by one device in a step.
    collectives: of the program, with their executions.
    chip: its peaks.
    axes: the mesh's, name -> size, outermost first.
    places: of the devices in the mesh's row-major order; see `places_of`. Of a
      torus they must be a whole slice.
    model_flops: of one device and step, for MFU; default `flops`.

  Raises:
    UserError: the table of chips lacks a figure that is needed.
  """
  if chip.hbm_bytes_per_s is None or (
    collectives and chip.interconnect is None
  ):
    raise UserError(
      f"no memory or link bandwidth is known of chip {chip.name!r}, so there is"
      f" no roofline (fusionlab/analysis/devices.py)"
    )
  by_axes: dict[str, float] = {}
  for collective in collectives:
    label = mesh_axes(collective, axes)
    seconds = collective.executions * _seconds(
      collective, chip.interconnect, places
    )
    by_axes[label] = by_axes.get(label, 0.0) + seconds
  times = {
    "compute": flops / chip.flops_per_s,
    "memory": hbm_bytes / chip.hbm_bytes_per_s,
    "communication": sum(by_axes.values()),
  }
  overlapped, serial = max(times.values()), sum(times.values())
  useful = (flops if model_flops is None else model_flops) / chip.flops_per_s
  return Roofline(
    **times,
    by_axes=by_axes,
    overlapped=overlapped,
    serial=serial,
    mfu_overlapped=useful / overlapped if overlapped else 0.0,
    mfu_serial=useful / serial if serial else 0.0,
    limit=max(times, key=lambda name: times[name]),
  )


def _seconds(
  collective: Collective,
  interconnect: Torus | Switched | None,
  places: Places,
) -> float:
  """Seconds of one execution, of its slowest group."""
  groups = [places[list(group)] for group in collective.groups]
  if isinstance(interconnect, Switched):
    return max(_on_switches(collective, interconnect, g) for g in groups)
  if not isinstance(interconnect, Torus):
    return 0.0
  if collective.kind == "collective-permute":
    return _permute_on_torus(collective, interconnect, places)
  shape = tuple((places.max(axis=0) + 1).tolist())
  return max(_on_torus(collective, interconnect, g, shape) for g in groups)


def _on_torus(
  collective: Collective,
  torus: Torus,
  members: Places,
  shape: tuple[int, ...],
) -> float:
  """Seconds of a group of chips in a slice of this shape."""
  distinct = [np.unique(column) for column in members.T]
  chips = len(np.unique(members, axis=0))
  if chips == 1:
    return 0.0  # the cores of one chip
  if np.prod([len(values) for values in distinct]) != chips:
    return collective.sent_bytes / torus.link_bytes_per_s
  rates, bisections = 0.0, []
  for values, whole in zip(distinct, shape, strict=True):
    n = len(values)
    if n == 1:
      continue
    stride = int(np.diff(values).max())
    ring = n * stride == whole and whole % torus.wraps_at == 0
    rate = torus.link_bytes_per_s * (2 if ring else 1) / stride
    rates += rate
    bisections.append(n / 4 / rate)
  if collective.kind.endswith("all-to-all"):
    return collective.operand_bytes * max(bisections)
  return collective.sent_bytes / rates


def _permute_on_torus(
  collective: Collective, torus: Torus, places: Places
) -> float:
  """Bytes on the busiest link, each message going the short way."""
  shape = places.max(axis=0) + 1
  load: dict[tuple[int, ...], int] = {}
  for source, target in collective.groups:
    at = places[source].copy()
    for d, size in enumerate(shape):
      away = int(places[target][d] - at[d])
      if size % torus.wraps_at == 0 and 2 * abs(away) > size:
        away -= int(np.sign(away)) * int(size)
      for _ in range(abs(away)):
        link = (*at.tolist(), d, int(np.sign(away)))
        load[link] = load.get(link, 0) + 1
        at[d] = (at[d] + np.sign(away)) % size
  busiest = max(load.values(), default=0)
  return busiest * collective.operand_bytes / torus.link_bytes_per_s


def _on_switches(
  collective: Collective, wires: Switched, members: Places
) -> float:
  """Seconds of a group of devices in these nodes."""
  nodes, sharing = np.unique(members[:, 0], return_counts=True)
  inside = collective.sent_bytes / wires.node_bytes_per_s
  if len(nodes) == 1:
    return inside
  n, share, count = len(members), int(sharing.min()), len(nodes)
  if collective.kind in ("collective-permute", "collective-broadcast"):
    return collective.operand_bytes / wires.network_bytes_per_s
  if collective.kind.endswith("all-to-all"):
    outside = collective.operand_bytes * (n - share) / n
    return max(inside, outside / wires.network_bytes_per_s)
  # Every node gets what it has not, through the cards of its members.
  passes = 2 if collective.kind == "all-reduce" else 1
  outside = passes * collective.whole_bytes * (count - 1) / count / share
  return max(inside, outside / wires.network_bytes_per_s)
