"""Makes the committed programs of absent TPUs; needs `jax[tpu]` and no TPU.

  python -m tests.analysis.make_hlo_fixtures

What neither the reader nor a person needs is dropped: tables of source files, the
kernels' bodies, and configs and origins of instructions that nothing is read from.
"""

import os

# Before jax is imported: compile for TPUs that are not there.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_WORKER_ID="0",
)

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
_READ = ("async_collective_fusion_config", "known_trip_count", "cost_estimate")


def _mesh() -> Mesh:
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x4"
  ).devices
  return Mesh(np.asarray(devices).reshape(2, 4), ("data", "fsdp"))


def _array(mesh: Mesh, spec: P, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
  )


def fsdp_scan() -> str:
  """Gradient of three layers, weights split over fsdp, rows over all."""
  mesh = _mesh()

  def loss(weights, x):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

  weights = _array(mesh, P(None, "fsdp"), 3, 2048, 2048)
  x = _array(mesh, P(("data", "fsdp")), 4096, 2048)
  step = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
  return step.lower(weights, x).compile().as_text()


def pallas_call() -> str:
  """A kernel that states its cost, in a loop of four."""
  mesh = _mesh()

  def double(x):
    def kernel(x_ref, y_ref):
      y_ref[...] = x_ref[...] * 2

    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
      name="double",
      metadata={"tile": "8"},  # printed on lines of its own
      cost_estimate=pl.CostEstimate(
        flops=1000, transcendentals=0, bytes_accessed=3000
      ),
    )(x)

  def run(x):
    return jax.lax.fori_loop(0, 4, lambda i, x: double(jnp.roll(x, i)), x)

  mapped = jax.shard_map(
    run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  x = _array(mesh, P("data"), 64, 128)
  return jax.jit(mapped).lower(x).compile().as_text()


def _shortened(text: str) -> str:
  head, blank, rest = text.partition("\n\n")
  start = re.search(r"^(?:%|ENTRY )", rest, re.MULTILINE)
  rest = rest[start.start() :] if start else rest
  rest = re.sub(r'"body":"[^"]*"', '"body":""', rest)

  def config(found: re.Match[str]) -> str:
    return found[0] if any(key in found[0] for key in _READ) else ""

  rest = re.sub(r", backend_config=.*$", config, rest, flags=re.MULTILINE)
  # Where it comes from is read of collectives, loops and kernels only.
  plain = (
    r"^(?!}}|.* (?:while|all-\w+|collective-\S+)\()(.*), metadata=\{[^}]*\}"
  )
  rest = re.sub(plain, r"\1", rest, flags=re.MULTILINE)
  return head + blank + rest


if __name__ == "__main__":
  FIXTURES.mkdir(exist_ok=True)
  for make in (fsdp_scan, pallas_call):
    path = FIXTURES / f"{make.__name__}.hlo.txt"
    path.write_text(_shortened(make()))
    print(path.name, path.stat().st_size)
