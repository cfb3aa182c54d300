"""Which environments make a job of several processes, and what jax is told."""

import pytest

from fusionlab.errors import UserError
from fusionlab.processes.joining import arguments_of, launched

LAPTOP = {"TPU_SKIP_MDS_QUERY": "1"}  # what jax's import leaves without a TPU
GIVEN = {
  **LAPTOP,
  "JAX_COORDINATOR_ADDRESS": "node0:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
SLURM = {
  **LAPTOP,
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[0-1]",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "9",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


@pytest.mark.parametrize(
  "environ",
  [
    LAPTOP,
    {**LAPTOP, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    {**SLURM, "SLURM_NTASKS": "1"},
    # A shell of its own within a job of sixteen tasks.
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    # What compiling for absent TPUs sets.
    {**LAPTOP, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    {**GIVEN, "JAX_NUM_PROCESSES": "1"},
    {"JAX_PLATFORMS": "cpu"},
  ],
)
def test_one_process_joins_nothing(environ):
  """Laptops, single tasks and shells: jax.distributed is not even asked."""
  assert arguments_of(environ) is None


def test_three_variables_are_enough():
  """Whatever else the environment says."""
  assert arguments_of({**SLURM, **GIVEN}) == {
    "coordinator_address": "node0:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  "environ",
  [
    SLURM,
    {**LAPTOP, "OMPI_COMM_WORLD_SIZE": "2"},
    {"TPU_WORKER_HOSTNAMES": "a,b"},
    {"MEGASCALE_NUM_SLICES": "2"},
    {
      **LAPTOP,
      "KUBERNETES_SERVICE_HOST": "10.0.0.1",
      "JOB_COMPLETION_INDEX": "0",
    },
  ],
)
def test_launchers_that_jax_knows(environ):
  """jax then finds the rest by itself."""
  assert launched(environ)
  assert arguments_of(environ) == {}


def test_a_tpu_host_asks_jax():
  """Only its metadata server knows whether there are other hosts."""
  assert arguments_of({}) == {}
  assert not launched({})


@pytest.mark.parametrize(
  "environ",
  [
    {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)"},
    {**SLURM, "CUDA_VISIBLE_DEVICES": "0"},
  ],
)
def test_a_task_keeps_the_gpus_it_sees(environ):
  """jax would give it the one GPU of its number on the node."""
  assert arguments_of(environ) == {"local_device_ids": []}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"JAX_PROCESS_ID": ""}, "without JAX_PROCESS_ID"),
    ({"JAX_COORDINATOR_ADDRESS": ""}, "without JAX_COORDINATOR_ADDRESS"),
    ({"JAX_PROCESS_ID": "4"}, "count from 0 to 3"),
    ({"JAX_NUM_PROCESSES": "four"}, "must be a number"),
    ({"JAX_COORDINATOR_ADDRESS": "node0"}, "must be host:port"),
  ],
)
def test_half_given_variables_are_refused(change, message):
  """In one line that names what is missing or wrong."""
  with pytest.raises(UserError, match=message) as error:
    arguments_of({**GIVEN, **change})
  assert "\n" not in str(error.value)
