"""Collectives of compiled programs: kind, devices, mesh axes and bytes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusionlab.analysis import hlo
from fusionlab.analysis.collectives import (
  Collective,
  device_groups,
  mesh_axes,
)
from fusionlab.errors import UserError

AXES = {"data": 2, "fsdp": 4}


def _analyse(function, *arguments) -> hlo.Program:
  return hlo.analyse(jax.jit(function).lower(*arguments).compile().as_text())


def _mesh() -> Mesh:
  return Mesh(
    np.asarray(jax.devices()).reshape(2, 4),
    tuple(AXES),
    axis_types=(AxisType.Auto,) * 2,
  )


def _mapped(function, axes) -> Collective:
  """The one collective of a function of each device's own [16, 32] float32."""
  mesh = _mesh()
  spec = P(("data", "fsdp"))
  mapped = jax.shard_map(
    functools.partial(function, axes=axes),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct(
    (8 * 16, 32), jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  program = _analyse(mapped, x)
  assert program.num_devices == 8
  (collective,) = program.collectives
  return collective


def _ring(x, axes):
  n = AXES[axes]
  return jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])


_PAYLOAD = 16 * 32 * 4


@pytest.mark.parametrize("axes", ["data", "fsdp", ("data", "fsdp")])
@pytest.mark.parametrize(
  ("kind", "function", "whole", "factor"),
  [
    ("all-reduce", lambda x, axes: jax.lax.psum(x, axes), 1, 2),
    (
      "all-gather",
      lambda x, axes: jax.lax.all_gather(x, axes, tiled=True),
      "n",
      1,
    ),
    (
      "reduce-scatter",
      lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True),
      1,
      1,
    ),
    (
      "all-to-all",
      lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True),
      1,
      1,
    ),
  ],
)
def test_collectives_by_hand(kind, function, whole, factor, axes):
  """Kind, axes, payload and the bytes that a device sends."""
  found = _mapped(function, axes)
  names = (axes,) if isinstance(axes, str) else axes
  n = math.prod(AXES[name] for name in names)
  assert (found.kind, found.group_size, found.executions) == (kind, n, 1)
  assert mesh_axes(found, AXES) == "+".join(names)
  assert found.operand_bytes == _PAYLOAD
  size = _PAYLOAD * (n if whole == "n" else whole)
  assert found.whole_bytes == size
  assert found.sent_bytes == pytest.approx(factor * (n - 1) / n * size)
  assert found.dtypes == ("f32",)


@pytest.mark.parametrize("axes", ["data", "fsdp"])
def test_a_permute_sends_its_payload_along_its_axis(axes):
  """Pairs of a ring along one axis."""
  found = _mapped(_ring, axes)
  assert found.kind == "collective-permute"
  assert mesh_axes(found, AXES) == axes
  assert len(found.groups) == 8
  assert found.sent_bytes == _PAYLOAD


def test_collectives_in_a_scan_are_executed_each_time():
  """FSDP: each of six layers gathers its weights once."""
  mesh = _mesh()

  def loss(w, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0]

  program = _analyse(
    loss,
    jax.ShapeDtypeStruct(
      (6, 64, 64),
      jnp.float32,
      sharding=NamedSharding(mesh, P(None, "fsdp")),
    ),
    jax.ShapeDtypeStruct(
      (16, 64), jnp.float32, sharding=NamedSharding(mesh, P("data"))
    ),
  )
  gathers = [c for c in program.collectives if c.kind == "all-gather"]
  gathered = sum(c.executions * c.result_bytes for c in gathers)
  assert gathered == 6 * 64 * 64 * 4
  assert {mesh_axes(c, AXES) for c in gathers} == {"fsdp"}


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, x=1", ((0, 1), (2, 3))),
    ("replica_groups=[2,4]<=[8], x=1", ((0, 1, 2, 3), (4, 5, 6, 7))),
    (
      "replica_groups=[4,2]<=[2,4]T(1,0), x=1",
      ((0, 4), (1, 5), (2, 6), (3, 7)),
    ),
    ("replica_groups={}, x=1", (tuple(range(8)),)),
    ("channel_id=1", (tuple(range(8)),)),
    ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    (
      "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2],"
      " device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}",
      ((0, 1, 2, 3), (4, 5, 6, 7)),
    ),
    (
      "replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={1}",
      ((0, 4), (1, 5), (2, 6), (3, 7)),
    ),
    # The outer half of an axis of four, the inner half, and both out of order.
    (
      "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}",
      ((0, 2), (1, 3), (4, 6), (5, 7)),
    ),
    (
      "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}",
      ((0, 1), (2, 3), (4, 5), (6, 7)),
    ),
    (
      "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2,'a'}",
      ((0, 4, 1, 5), (2, 6, 3, 7)),
    ),
  ],
)
def test_device_groups_in_every_printed_form(text, groups):
  """Explicit, iota, transposed iota, mesh and sub-axis groups."""
  assert device_groups(text, 8) == groups


def test_groups_that_leave_out_devices_are_marked():
  """Half of an axis is not the axis."""
  found = _mapped(lambda x, axes: jax.lax.psum(x, axes), "fsdp")
  assert mesh_axes(found, {"data": 1, "fsdp": 8}) == "fsdp[4 of 8]"
  with pytest.raises(UserError, match="beyond the 4 devices"):
    mesh_axes(found, {"data": 1, "fsdp": 4})
