"""Peak dense bfloat16 FLOPs/s of accelerators, for model FLOPs utilisation."""

from typing import Any

# Vendors' figures for dense bfloat16, by a part of `device.device_kind`; the
# first match counts, so longer names stand before those they contain.
_PEAK_FLOPS = (
  ("H200", 989e12),
  ("H100 PCIe", 756e12),
  ("H100 NVL", 835e12),
  ("H100", 989e12),
  ("B200", 2250e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L4", 121e12),
  ("V100", 125e12),
  ("TPU v6 lite", 918e12),
  ("TPU v6e", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5p", 459e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


def peak_flops(device: Any) -> float | None:
  """Peak FLOPs/s of a device; None where it is not known (every CPU).

  Args:
    device: a `jax.Device`.
  """
  for kind, flops in _PEAK_FLOPS:
    if kind in device.device_kind:
      return flops
  return None
