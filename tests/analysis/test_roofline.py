"""The roofline's times are those that a hand computes."""

import dataclasses

import numpy as np
import pytest

from fusionlab.analysis import roofline
from fusionlab.analysis.collectives import Collective
from fusionlab.analysis.devices import Chip, Switched, Torus, chip
from fusionlab.errors import UserError

LINK = 100.0
TORUS = Chip(
  "torus", (), 1e6, 1e9, 1e4, interconnect=Torus(2, LINK, wraps_at=4)
)
SWITCHED = Chip(
  "switched", (), 1e6, 1e9, 1e4, interconnect=Switched(800.0, 4, 100.0)
)


def _slice(*shape: int) -> np.ndarray:
  """Chips of a slice in row-major order."""
  return np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)


def _groups(shape: tuple[int, ...], along: tuple[int, ...]):
  """Groups of ids that vary along some axes of a row-major mesh."""
  ids = np.arange(np.prod(shape)).reshape(shape)
  rest = [d for d in range(len(shape)) if d not in along]
  size = int(np.prod([shape[d] for d in along]))
  return tuple(
    tuple(g)
    for g in ids.transpose(rest + list(along)).reshape(-1, size).tolist()
  )


def _collective(kind: str, operand: int, groups, **more) -> Collective:
  n = max(len(g) for g in groups)
  result = {"all-gather": n * operand, "reduce-scatter": operand // n}
  return Collective(
    kind=kind,
    name=kind,
    op_name="",
    dtypes=("f32",),
    executions=more.get("executions", 1),
    operand_bytes=operand,
    result_bytes=result.get(kind, operand),
    group_size=n,
    groups=groups,
    use_global_device_ids=True,
  )


def _estimate(collectives, which, axes, places, **more) -> roofline.Roofline:
  return roofline.estimate(
    flops=more.get("flops", 0.0),
    hbm_bytes=more.get("hbm_bytes", 0.0),
    collectives=collectives,
    chip=which,
    axes=axes,
    places=places,
    model_flops=more.get("model_flops"),
  )


_MESH = {"data": 4, "fsdp": 8}
_PLACES = _slice(4, 8)
_DATA, _FSDP = _groups((4, 8), (0,)), _groups((4, 8), (1,))
_ALL = _groups((4, 8), (0, 1))


@pytest.mark.parametrize(
  ("kind", "operand", "groups", "seconds"),
  [
    # A ring of 8: 7 parts of 100 bytes come in over two directions.
    ("all-gather", 100, _FSDP, 700 / (2 * LINK)),
    ("reduce-scatter", 800, _FSDP, 700 / (2 * LINK)),
    ("all-reduce", 800, _FSDP, 1400 / (2 * LINK)),
    # A ring of 4.
    ("all-gather", 100, _DATA, 300 / (2 * LINK)),
    # Both dimensions at once.
    ("all-gather", 100, _ALL, 3100 / (4 * LINK)),
    # The middle of a ring of 8: an eighth of 800 bytes from each of 4 to each
    # of 4, half of it each way round.
    ("all-to-all", 800, _FSDP, 4 * 4 * 100 / 2 / LINK),
    ("all-to-all", 3200, _ALL, 3200 * 8 / 4 / (2 * LINK)),
  ],
)
def test_collectives_on_a_torus_with_rings(kind, operand, groups, seconds):
  """All links of the dimensions that a group fills, in both directions."""
  found = _estimate([_collective(kind, operand, groups)], TORUS, _MESH, _PLACES)
  assert found.communication == pytest.approx(seconds)


def test_a_line_has_half_a_rings_rate():
  """Two and six are no multiples of four."""
  places = _slice(2, 6)
  mesh = {"data": 2, "fsdp": 6}
  along = [_groups((2, 6), (d,)) for d in range(2)]
  pair = _estimate(
    [_collective("all-gather", 100, along[0])], TORUS, mesh, places
  )
  line = _estimate(
    [_collective("all-gather", 100, along[1])], TORUS, mesh, places
  )
  assert pair.by_axes == {"data": pytest.approx(100 / LINK)}
  assert line.by_axes == {"fsdp": pytest.approx(500 / LINK)}
  both = _collective("all-to-all", 1200, along[1])
  # 3 x 3 parts of 200 bytes cross the middle link.
  assert _estimate([both], TORUS, mesh, places).communication == pytest.approx(
    9 * 200 / LINK
  )


def test_half_a_dimension_is_a_line_and_interleaved_groups_share():
  """Four of eight chips in a row, or every second one."""
  places = _slice(1, 8)
  near = tuple(tuple(range(i, i + 4)) for i in (0, 4))
  far = tuple(tuple(range(i, 8, 2)) for i in (0, 1))
  mesh = {"outer": 2, "inner": 4}
  rows = _estimate([_collective("all-gather", 100, near)], TORUS, mesh, places)
  assert rows.by_axes == {"inner": pytest.approx(300 / LINK)}
  # Two rings over the same links, each with half of both directions.
  mesh = {"outer": 4, "inner": 2}
  rings = _estimate([_collective("all-gather", 100, far)], TORUS, mesh, places)
  assert rings.by_axes == {"outer": pytest.approx(300 / (2 * LINK / 2))}


def test_permutes_cost_their_busiest_link():
  """A shift by one; by three on a ring of eight; around the end of a line."""

  def shift(n: int, by: int, width: int):
    pairs = tuple((i, (i + by) % n) for i in range(n))
    permute = _collective("collective-permute", 100, pairs)
    return _estimate(
      [permute], TORUS, {"x": width}, _slice(1, width)
    ).communication

  assert shift(8, 1, 8) == pytest.approx(100 / LINK)
  assert shift(8, 3, 8) == pytest.approx(300 / LINK)
  # On a line the last goes back over all links, against the others.
  assert shift(6, 1, 6) == pytest.approx(100 / LINK)
  assert shift(6, 2, 6) == pytest.approx(200 / LINK)


def test_groups_inside_and_across_nodes():
  """Nodes of four with 800 inside, and 100 for each GPU between them."""
  mesh = {"data": 2, "fsdp": 4}
  places = np.repeat(np.arange(2), 4)[:, None]
  inside = _groups((2, 4), (1,))
  across = _groups((2, 4), (0,))
  both = _groups((2, 4), (0, 1))

  def seconds(kind, operand, groups):
    found = _collective(kind, operand, groups)
    return _estimate([found], SWITCHED, mesh, places).communication

  assert seconds("all-gather", 400, inside) == pytest.approx(1200 / 800)
  assert seconds("all-reduce", 800, inside) == pytest.approx(1200 / 800)
  # One of each node: its card carries half of the sum twice.
  assert seconds("all-reduce", 800, across) == pytest.approx(800 / 100)
  # All eight: half of 3200 enters each node through four cards.
  assert seconds("all-gather", 400, both) == pytest.approx(1600 / 4 / 100)
  # Half of 800 leaves the node through a device's own card.
  assert seconds("all-to-all", 800, both) == pytest.approx(400 / 100)
  ring = tuple((i, (i + 1) % 8) for i in range(8))
  assert seconds("collective-permute", 100, ring) == pytest.approx(100 / 100)


@pytest.mark.parametrize(
  ("flops", "hbm_bytes", "operand", "limit"),
  [
    (8e6, 1e4, 100, "compute"),
    (1e6, 9e4, 100, "memory"),
    (1e6, 1e4, 1000, "communication"),
  ],
)
def test_the_longest_time_limits(flops, hbm_bytes, operand, limit):
  """Max where all overlaps, sum where nothing does; MFU of useful FLOPs."""
  gather = _collective("all-gather", operand, _FSDP, executions=2)
  found = _estimate(
    [gather],
    TORUS,
    _MESH,
    _PLACES,
    flops=flops,
    hbm_bytes=hbm_bytes,
    model_flops=flops / 2,
  )
  times = (flops / 1e6, hbm_bytes / 1e4, 2 * 7 * operand / (2 * LINK))
  assert (found.compute, found.memory) == pytest.approx(times[:2])
  assert found.by_axes == {"fsdp": pytest.approx(times[2])}
  assert found.limit == limit
  assert found.overlapped == pytest.approx(max(times))
  assert found.serial == pytest.approx(sum(times))
  assert found.mfu_overlapped == pytest.approx(times[0] / 2 / max(times))
  assert found.mfu_serial == pytest.approx(times[0] / 2 / sum(times))


def test_places_of_devices():
  """Coordinates of TPUs, nodes of GPUs."""

  @dataclasses.dataclass
  class _Device:
    id: int
    coords: tuple[int, ...] = (0, 0, 0)

  gpus = [_Device(i) for i in (0, 7, 8)]
  assert roofline.places_of(gpus, chip("h100")).tolist() == [[0], [0], [1]]
  tpus = [_Device(0), _Device(1, (1, 0, 0))]
  assert roofline.places_of(tpus, chip("v5e")).tolist() == [
    [0, 0, 0],
    [1, 0, 0],
  ]


def test_a_chip_without_figures_has_no_roofline():
  """Said, not guessed."""
  with pytest.raises(UserError, match="of chip 'l4'"):
    _estimate([], chip("l4"), {"data": 1}, _slice(1, 1))
