"""Meshes: five axes, always, of size 1 unless a config says otherwise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fusionlab.config import option
from fusionlab.errors import UserError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """`config.mesh`: a preset, and sizes that override it (0: the preset's).

  `cpu` uses one device; `gpu` and `tpu` spread the batch and the parameters
  over every device (`fsdp`).
  """

  preset: str = option(
    "cpu", "where the job runs", choices=("cpu", "gpu", "tpu")
  )
  data: int = option(0, "data-parallel shards", minimum=0)
  fsdp: int = option(0, "shards of parameters and batch", minimum=0)
  tensor: int = option(0, "tensor-parallel shards", minimum=0, maximum=1)
  expert: int = option(0, "expert-parallel shards", minimum=0, maximum=1)
  sequence: int = option(0, "context-parallel shards", minimum=0, maximum=1)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Sizes of the five axes for a number of devices.

  Args:
    config: the preset and the sizes that override it.
    num_devices: devices at hand.

  Raises:
    UserError: sizes whose product is more than the devices, or (accelerators)
      leaves some idle, with the arithmetic.
  """
  given = {axis: getattr(config, axis) for axis in AXES}
  sizes = {axis: size or 1 for axis, size in given.items()}
  if config.preset != "cpu" and not given["fsdp"]:
    rest = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    sizes["fsdp"] = max(1, num_devices // rest)
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
  return tuple(sizes.values())


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the device mesh with Auto axis types.

  Args:
    config: preset and sizes.
    devices: of one platform; default `jax.devices()`.

  Raises:
    UserError: see `mesh_shape`; or a preset whose platform is not there.
  """
  devices = list(jax.devices() if devices is None else devices)
  platform = devices[0].platform
  if config.preset != platform and not (
    config.preset == "gpu" and platform in ("cuda", "rocm")
  ):
    raise UserError(
      f"config.mesh.preset={config.preset} but jax sees {len(devices)}"
      f" {platform} device(s); set config.mesh.preset={platform}, or install"
      f" jax for {config.preset} (BUILD.md)"
    )
  shape = mesh_shape(config, len(devices))
  if config.preset == "cpu":
    # Host devices have no topology: take the first ones in order.
    grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )
