"""Devices that are not there, for compiling on a host without accelerators."""

import os
from typing import Any

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
  import libtpu  # noqa: F401  (jax's own message does not name the package)
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
