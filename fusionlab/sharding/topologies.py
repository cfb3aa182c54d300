"""Devices that are not there, for compiling on a host without accelerators."""

import contextlib
import importlib
import os
from typing import Any

import jax

from fusionlab.errors import UserError
from fusionlab.sharding.mesh import PRESETS

# No metadata server to wait for, and no lock that another process could hold.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def absent_devices(preset: str) -> list[Any]:
  """Descriptions of the chips of a TPU slice; programs compile for them.

  Args:
    preset: a name of `sharding.mesh.PRESETS` with a topology.

  Raises:
    UserError: libtpu does not know the slice.
    ModuleNotFoundError: libtpu is not installed (the extra `tpu`).
  """
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  importlib.import_module("libtpu")  # jax's own message does not name it
  from jax.experimental import topologies

  slice_name = PRESETS[preset].topology
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=slice_name
    )
  except Exception as error:
    raise UserError(
      f"libtpu cannot describe {slice_name} of config.mesh.preset={preset}:"
      f" {error}"
    ) from error
  return list(found.devices)


def host_devices(count: int) -> list[Any]:
  """Host devices that stand for chips while a program is lowered.

  Args:
    count: how many; jax makes them when it makes its first.

  Raises:
    UserError: this process has already made fewer.
  """
  with contextlib.suppress(
    RuntimeError
  ):  # made already; perhaps enough of them
    jax.config.update("jax_num_cpu_devices", count)
  found = jax.devices("cpu")
  if len(found) < count:
    raise UserError(
      f"lowering for {count} devices needs as many host devices, and this process"
      f" has already made {len(found)}; use one that has not used jax"
    )
  return list(found[:count])
