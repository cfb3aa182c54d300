"""Processes of one job find each other; a program that runs alone is left alone.

JAX knows SLURM, Open MPI, TPU pods and Kubernetes by itself; anything else says
who is who by three variables. What JAX would take for a job of several although
it is one (a single SLURM task with eight GPUs would lose seven) is kept from it.
"""

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from fusionlab.errors import UserError
from fusionlab.processes import peers

ADDRESS, COUNT, INDEX = (
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
)
_SLURM = (
  "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
  "SLURM_LOCALID",
)  # fmt: skip


def join(
  *, peer_timeout: float, preemptible: bool = False, start_timeout: int = 300
) -> None:
  """Joins this process to its job, before anything asks jax for devices.

  Args:
    peer_timeout: seconds without a sign of life after which a process counts as
      lost, see `peers.watch`.
    preemptible: SIGTERM is left to jax, which makes all processes see it at the
      same step (`multihost_utils.reached_preemption_sync_point`); otherwise it
      ends the process.
    start_timeout: seconds after which this process ends where others did not
      come.

  Raises:
    UserError: variables that are half given or wrong.
  """
  if jax.distributed.is_initialized():
    return
  arguments = arguments_of(os.environ)
  if arguments is None:
    return
  jax.config.update("jax_enable_preemption_service", preemptible)
  # jax itself would abort from C++.
  waiting = threading.Timer(start_timeout, _alone, (start_timeout,))
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=start_timeout + 60,
      # Ours comes first and says more; this is the net below it.
      heartbeat_timeout_seconds=round(2 * peer_timeout + 10),
    )
  except ValueError as error:
    if "coordinator_address should be defined" not in str(error):
      raise
    if launched(os.environ):
      raise UserError(
        f"this process was started as one of several, but jax finds no"
        f" coordinator; set {ADDRESS}=host:port, {COUNT} and {INDEX}"
      ) from error
    return  # jax asked the TPU's host and it is alone
  finally:
    waiting.cancel()
  peers.watch(peer_timeout)


def _alone(seconds: int) -> None:
  print(
    f"error: the other processes of this job did not come within {seconds} s;"
    f" all must be started, with one address of process 0 that they can reach",
    file=sys.stderr,
    flush=True,
  )
  os._exit(peers.LOST)


def arguments_of(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` is to be told; None: nothing to join.

  Args:
    environ: the process's environment.

  Raises:
    UserError: some of the three variables without the others, or a value that
      is no number.
  """
  given = [name for name in (ADDRESS, COUNT, INDEX) if environ.get(name)]
  if environ.get(COUNT) == "1":
    return None
  arguments: dict[str, Any] = {}
  if COUNT in given:
    arguments["num_processes"] = _number(environ, COUNT)
  if INDEX in given:
    arguments["process_id"] = _number(environ, INDEX)
  if len(given) == 3:
    count, index = arguments["num_processes"], arguments["process_id"]
    if not 0 <= index < count:
      raise UserError(
        f"{INDEX}={index} is not one of {COUNT}={count} processes, which count"
        f" from 0 to {count - 1}"
      )
    address = environ[ADDRESS]
    if not address.rpartition(":")[2].isdigit():
      raise UserError(f"{ADDRESS}={address!r} must be host:port")
    return {
      "coordinator_address": address,
      "cluster_detection_method": "deactivate",
      **arguments,
    }
  if launched(environ):
    if _owns_its_node(environ):
      # jax gives a task one GPU, the one of its number; [] is all it sees.
      arguments["local_device_ids"] = []
    return arguments
  if given:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    raise UserError(
      f"{' and '.join(given)} given without {' and '.join(missing)}; a job of"
      f" several processes needs all three, one alone needs none"
    )
  # jax's import sets this where the machine has no TPU, so that nothing waits
  # for a metadata server; with a TPU only that server knows of other hosts.
  has_tpu = "TPU_SKIP_MDS_QUERY" not in environ
  if has_tpu and "tpu" in environ.get("JAX_PLATFORMS", "tpu"):
    return {}
  return None


def launched(environ: Mapping[str, str]) -> bool:
  """Whether a launcher that jax knows started this as one of several."""
  if all(name in environ for name in _SLURM):
    # A step's own count: a shell within a job of many tasks is one.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])
    return int(tasks) > 1
  if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
    return True
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
    return True
  return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()


def _owns_its_node(environ: Mapping[str, str]) -> bool:
  """Whether every GPU that the process can see is its own."""
  per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get(
    "OMPI_COMM_WORLD_LOCAL_SIZE", ""
  )
  # "1(x16)": one on each of 16 nodes.
  if per_node.partition("(")[0] == "1":
    return True
  # The launcher gave the task one GPU and hides the others.
  return environ.get("CUDA_VISIBLE_DEVICES", ",").isdigit()


def _number(environ: Mapping[str, str], name: str) -> int:
  try:
    return int(environ[name])
  except ValueError as error:
    raise UserError(f"{name}={environ[name]!r} must be a number") from error
