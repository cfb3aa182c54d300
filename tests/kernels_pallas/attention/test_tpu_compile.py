"""Attention really compiles for TPU, with no TPU there, and holds no L² array.

Compiled for the four chips of a v5e host, two rows to each. Nothing is run.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.attention import attention

pytest.importorskip(
  "libtpu", reason="the extra `tpu` is not installed (libtpu compiles for TPU)"
)
# Before libtpu is loaded: no metadata server to wait for, and no lock that
# another process of the tests could hold.
for _name, _value in {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}.items():
  os.environ.setdefault(_name, _value)

LENGTH, HEADS, GROUPS, CHIPS = 2048, 4, 2, 4
# Of one row the reference's scores fit into a chip's VMEM, which is not counted.
ROWS = 2 * CHIPS
# A byte for each score of a chip.
SCORES = ROWS // CHIPS * HEADS * LENGTH * LENGTH
AXIS = PartitionSpec("rows")


@functools.cache
def mesh() -> Mesh:
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  devices = np.asarray(topology.devices)
  return Mesh(devices, ("rows",), axis_types=(AxisType.Auto,))


def compiled(name: str, width: int):
  """The compiled gradients of a call; a chip has two rows."""

  def array(*shape, dtype="bfloat16"):
    sharding = NamedSharding(mesh(), AXIS)
    return jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=sharding)

  def loss(*arrays):
    call = jax.shard_map(
      functools.partial(attention, documents=True, implementation=name),
      in_specs=AXIS,
      out_specs=AXIS,
      check_vma=False,
    )
    return call(*arrays).astype(jnp.float32).sum()

  def gradients(*arrays):
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
      return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

  q, k = (array(LENGTH, heads, width) for heads in (HEADS, GROUPS))
  interval = array(LENGTH, dtype="int32")
  return jax.jit(gradients).lower(q, k, k, interval, interval).compile()


def squares(program) -> set[str]:
  """Shapes in a compiled program with two axes as long as the sequence."""
  found = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
  return {
    shape
    for shape in found
    if sum(int(size) >= LENGTH for size in shape.split(",")) > 1
  }


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["splash", "xla_blockwise"])
def test_compiles_for_tpu_without_a_square(name, width):
  program = compiled(name, width)
  assert not squares(program)
  assert program.memory_analysis().temp_size_in_bytes < SCORES
  assert ("tpu_custom_call" in program.as_text()) == (name == "splash")


def test_the_reference_holds_squares():
  """So the tests above would see one."""
  program = compiled("reference", 64)
  assert squares(program)
  assert program.memory_analysis().temp_size_in_bytes > SCORES
