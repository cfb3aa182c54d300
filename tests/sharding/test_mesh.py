"""Presets name machines; sizes fill them, or are refused with the arithmetic."""

import dataclasses

import jax
import pytest

from fusionlab.analysis import devices
from fusionlab.errors import UserError
from fusionlab.sharding.mesh import (
  PRESETS,
  MeshConfig,
  make_mesh,
  mesh_shape,
)


@pytest.mark.parametrize(
  ("config", "count", "sizes"),
  [
    (MeshConfig(), 8, (1, 1, 1, 1, 1)),
    (MeshConfig(data=2, tensor=2), 8, (2, 1, 2, 1, 1)),
    (MeshConfig("auto"), 8, (1, 8, 1, 1, 1)),
    (MeshConfig("auto", data=2), 8, (2, 4, 1, 1, 1)),
    (MeshConfig("auto", fsdp=2, tensor=2), 8, (2, 2, 2, 1, 1)),
    (MeshConfig("tpu_v5e_256", fsdp=64), 256, (4, 64, 1, 1, 1)),
    (MeshConfig("gpu_h100_64", tensor=8), 64, (1, 8, 8, 1, 1)),
    (MeshConfig("tpu_v5p_128", sequence=4), 128, (1, 32, 1, 1, 4)),
  ],
)
def test_what_is_not_given_is_filled_up(config, count, sizes):
  """By fsdp, or by data where fsdp is given; the cpu preset fills nothing."""
  assert tuple(mesh_shape(config, count).values()) == sizes


@pytest.mark.parametrize(
  ("config", "count", "message"),
  [
    (MeshConfig(data=4, fsdp=4), 8, "needs 16 devices.*there are 8"),
    (MeshConfig("auto", data=3), 8, "uses 6 of 8"),
    (MeshConfig("tpu_v5e_16", tensor=32), 16, "needs 32 devices"),
  ],
)
def test_meshes_that_do_not_fit_are_refused(config, count, message):
  """One line with the product and the devices."""
  with pytest.raises(UserError, match=message):
    mesh_shape(config, count)


def test_every_preset_names_a_known_chip():
  """And TPU slices have as many chips as their topology says."""
  for preset in PRESETS.values():
    assert devices.chip(preset.chip).interconnect is not None
    if preset.topology:
      sizes = preset.topology.split(":")[1].split("x")
      product = 1
      for size in sizes:
        product *= int(size)
      assert product == preset.devices


@dataclasses.dataclass
class FakeDevice:
  """As much of a device as a mesh asks about."""

  device_kind: str
  platform: str = "tpu"
  process_index: int = 0


def test_a_machine_that_is_not_the_presets_is_refused():
  """Another chip, another number, or an accelerator under `cpu`."""
  with pytest.raises(UserError, match="is 256 v5e chips but jax sees 8 cpu"):
    make_mesh(MeshConfig("tpu_v5e_256"))
  v5p = [FakeDevice("TPU v5")] * 16
  with pytest.raises(UserError, match="is 16 v5e chips but jax sees 16 tpu"):
    make_mesh(MeshConfig("tpu_v5e_16"), v5p)
  with pytest.raises(UserError, match="is 128 v5p chips but jax sees 16 tpu"):
    make_mesh(MeshConfig("tpu_v5p_128"), v5p)
  with pytest.raises(UserError, match="preset=cpu but jax sees 16 tpu"):
    make_mesh(MeshConfig(), v5p)


def test_a_mesh_leaves_no_process_out():
  """With several processes all of their devices work."""
  found = [FakeDevice("cpu", "cpu", process_index=i // 2) for i in range(4)]
  with pytest.raises(UserError, match="uses 2 of the 4 devices of 2 processes"):
    make_mesh(MeshConfig(data=2), found)
  assert make_mesh(MeshConfig("auto"), jax.devices()).shape["fsdp"] == 8
