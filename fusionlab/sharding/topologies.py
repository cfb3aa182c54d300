"""Devices that are not there, for compiling on a host without accelerators."""

import contextlib
import importlib
import importlib.util
import os
from typing import Any

import jax

from fusionlab.analysis.devices import Switched
from fusionlab.analysis.gpu_targets import GpuTarget
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

# What it takes to compile for GPUs where there is none.
CUDA_HOW = (
  "the CUDA plugin of jax and ptxas (no GPU): pip install -e '.[cuda]', or of that"
  " only jax-cuda13-plugin (of jax's version), nvidia-cuda-nvcc and nvidia-nvvm"
)


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


# jax's plugins for CUDA, the newest first; each brings XLA's compiler for it.
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def cuda_plugin() -> str:
  """The installed CUDA plugin of jax, as imported; "" where there is none."""
  for name in _CUDA_PLUGINS:
    if importlib.util.find_spec(name) is not None:
      return name
  return ""


def absent_gpus(preset: str, target: GpuTarget) -> list[Any]:
  """Descriptions of the GPUs of a job; programs compile for them.

  Args:
    preset: a name of `sharding.mesh.PRESETS` of GPUs.
    target: what each is.

  Raises:
    UserError: the CUDA plugin is not there or not of jax's version, or XLA cannot
      read the description.
  """
  plugin, count = cuda_plugin(), PRESETS[preset].devices
  if not plugin:
    raise UserError(
      f"compiling for config.mesh.preset={preset} needs {CUDA_HOW}"
    )
  from jax.experimental import topologies

  wires, per_node = target.chip.interconnect, count
  if isinstance(wires, Switched):
    per_node = min(wires.node_size, count)
  try:
    # Slices, nodes of a slice, GPUs of a node.
    found = topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      topology=f"1x{count // per_node}x{per_node}",
      target_config=target.text,
    )
  except NotImplementedError as error:
    raise UserError(
      f"jax {jax.__version__} did not load {plugin}; it must be of the same version"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"XLA cannot describe the GPUs of config.mesh.preset={preset} by"
      f" {target.file}: {error}"
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
