"""Where the computation that is being traced will run."""

import jax


def target_platform() -> str:
  """The platform to choose an implementation for: "cpu", "gpu" or "tpu".

  That of the mesh in scope, so that a program compiled on a CPU host for absent
  devices chooses as it would on them; without a mesh, jax's default backend.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name in ("cuda", "rocm") else name
