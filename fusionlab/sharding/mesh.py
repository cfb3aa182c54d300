"""Meshes: five axes, always, of size 1 unless a config says otherwise.

A preset names the hardware: which chips, how many, wired how. The axes' sizes are
free within it, and what is not given is filled up so that every device works.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from fusionlab.analysis.devices import chip_of
from fusionlab.config import option
from fusionlab.errors import UserError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")


@dataclasses.dataclass(frozen=True)
class Preset:
  """Hardware that a job is meant for.

  Attributes:
    chip: a name of `fusionlab.analysis.devices`.
    devices: chips of the whole job.
    topology: TPU: the slice as libtpu names it.
  """

  chip: str
  devices: int
  topology: str = ""


# Numbers are chips, as the topologies have them; Google Cloud's own name of a v5p
# slice counts cores, two to a chip ("v5p-256" has 128 chips).
PRESETS: Mapping[str, Preset] = {
  "gpu_h100_8": Preset("h100", 8),
  "gpu_h100_64": Preset("h100", 64),
  "tpu_v5e_16": Preset("v5e", 16, "v5e:4x4"),
  "tpu_v5e_256": Preset("v5e", 256, "v5e:16x16"),
  "tpu_v5p_128": Preset("v5p", 128, "v5p:4x4x8"),
  "tpu_v6e_256": Preset("v6e", 256, "v6e:16x16"),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """`config.mesh`: a preset, and sizes of axes within it.

  `cpu` uses one host device, or as many as the sizes say; `auto` every device
  that jax sees; the others name a machine and refuse another one. Where a size
  is 0, `fsdp` takes the devices that are left, or `data` where `fsdp` is given.
  """

  preset: str = option(
    "cpu", "where the job runs", choices=("cpu", "auto", *PRESETS)
  )
  data: int = option(0, "data-parallel shards", minimum=0)
  fsdp: int = option(0, "shards of parameters and batch", minimum=0)
  tensor: int = option(
    0, "tensor-parallel shards: heads, FFN, vocabulary", minimum=0
  )
  expert: int = option(
    0, "shards of experts and memory tables, and of the batch", minimum=0
  )
  sequence: int = option(
    0, "context-parallel shards: positions of a row", minimum=0
  )


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Sizes of the five axes for a number of devices.

  Args:
    config: the preset and the sizes.
    num_devices: devices at hand.

  Raises:
    UserError: sizes whose product is more than the devices, or (all but `cpu`)
      leaves some idle, with the arithmetic.
  """
  given = {axis: getattr(config, axis) for axis in AXES}
  sizes = {axis: size or 1 for axis, size in given.items()}
  free = [axis for axis in ("fsdp", "data") if not given[axis]]
  if config.preset != "cpu" and free:
    sizes[free[0]] = max(1, num_devices // math.prod(sizes.values()))
  product = math.prod(sizes.values())
  shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
  if product > num_devices:
    raise UserError(
      f"config.mesh needs {product} devices ({shown}) and there are"
      f" {num_devices}; the product must be at most {num_devices}"
    )
  if config.preset != "cpu" and product != num_devices:
    raise UserError(
      f"config.mesh uses {product} of {num_devices} devices ({shown}); the"
      f" product must be {num_devices}"
    )
  return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the device mesh with Auto axis types.

  Args:
    config: preset and sizes.
    devices: of one platform; default `jax.devices()`, those of all processes.

  Raises:
    UserError: see `mesh_shape`; a preset whose machine is not there; or, with
      several processes, a mesh that leaves one out.
  """
  devices = list(jax.devices() if devices is None else devices)
  _check_machine(config, devices)
  shape = tuple(mesh_shape(config, len(devices)).values())
  processes = len({device.process_index for device in devices})
  if processes > 1 and math.prod(shape) != len(devices):
    raise UserError(
      f"config.mesh uses {math.prod(shape)} of the {len(devices)} devices of"
      f" {processes} processes; config.mesh.preset=auto takes all of them"
    )
  if devices[0].platform == "cpu":
    # Host devices have no topology: take the first ones in order.
    grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  # Axes may share a dimension of the torus: 64 x 4 on 16 x 16 chips.
  grid = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_machine(config: MeshConfig, devices: Sequence[Any]) -> None:
  """Raises UserError where the devices are not the preset's."""
  platform, kind = devices[0].platform, devices[0].device_kind
  seen = f"jax sees {len(devices)} {platform} device(s) ({kind})"
  if config.preset == "auto":
    return
  if config.preset == "cpu":
    if platform != "cpu":
      raise UserError(
        f"config.mesh.preset=cpu but {seen}; set config.mesh.preset=auto, or"
        f" JAX_PLATFORMS=cpu in the environment"
      )
    return
  preset = PRESETS[config.preset]
  here = chip_of(devices[0])
  if here is None or here.name != preset.chip or len(devices) != preset.devices:
    raise UserError(
      f"config.mesh.preset={config.preset} is {preset.devices} {preset.chip}"
      f" chips but {seen}; config.mesh.preset=auto takes those, and"
      f" --mode=compile needs none"
    )
