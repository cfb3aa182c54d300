"""Why an implementation cannot do a call, in words for the one who asked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from kernels_pallas.platform import target_platform

# A mask of 4096 x 4096 is 32 MiB a row as a bias of 2 bytes a value.
_MASKED_KEYS = 4096


def platform(wanted: str) -> str | None:
  """Says that the computation runs elsewhere.

  Args:
    wanted: "gpu" or "tpu".
  """
  found = target_platform()
  return None if found == wanted else f"it runs on {wanted}, not {found}"


def mesh() -> str | None:
  """Says that the compiler would have to split a kernel, which it cannot."""
  scope = jax.sharding.get_abstract_mesh()
  axes = zip(scope.axis_sizes, scope.axis_types, strict=True)
  if any(size > 1 and kind != AxisType.Manual for size, kind in axes):
    return "the mesh in scope splits arrays; call it inside jax.shard_map"
  return None


def dtypes(allowed: tuple[str, ...], *arrays: jax.Array) -> str | None:
  """Says which dtype is not among the allowed ones.

  Args:
    allowed: names.
    arrays: q, k and v.
  """
  for array in arrays:
    if array.dtype.name not in allowed:
      return f"{array.dtype.name} (it takes {' and '.join(allowed)})"
  return None


def mask(keys: int) -> str | None:
  """Says that a mask of all queries and keys would be too large.

  Args:
    keys: how many there are.
  """
  if keys > _MASKED_KEYS:
    return (
      f"{keys} keys (it builds a mask of B·Q·S values, so it takes up to"
      f" {_MASKED_KEYS})"
    )
  return None


def trial(
  function: Callable[..., Any], *arrays: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
  """Says what tracing a function and its gradient raises.

  So a library speaks for itself, in whatever version it is installed. Only
  shapes are traced: nothing is compiled or computed.

  Args:
    function: of the arrays, to the output.
    arrays: q, k, v (differentiated), then the others.
  """

  def loss(*arrays):
    return function(*arrays).astype(jnp.float32).sum()

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
  try:
    jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *shapes)
  # Another version of the library may fail in any way.
  except Exception as error:
    lines = str(error).strip().rstrip(".").splitlines() or [""]
    expected = isinstance(error, NotImplementedError)
    return lines[0] if expected else f"{type(error).__name__}: {lines[0]}"
  return None
