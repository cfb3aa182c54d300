"""Chips: what each can compute, hold and send, with the sources of the figures.

Figures are vendors' peaks, which no program reaches; a jax device is a chip, except
on TPU v4 without megacore and TPU7x, where it is one of the chip's two cores.

[gcp] Google Cloud's system architecture pages, docs.cloud.google.com/tpu/docs/v4,
  v5e, v5p, v6e, tpu7x. Interconnect is given per chip, both directions together; a
  link's direction is that divided by the ports and by two.
[libtpu] What libtpu 0.0.42.1 names as available when a program does not fit
  ("exceeds available HBM (15.75G)"), compiled for the chip without one.
[book] Austin et al., "How to Scale Your Model", jax-ml.github.io/scaling-book: TPUs
  in chapter 2, GPUs in chapter 12 (which quotes nvidia.com's product pages). Its ICI
  links have 10% less than [gcp]'s, 4.5e10 and 9e10 bytes/s.
[xla] What XLA read from such devices: github.com/openxla/xla, xla/backends/gpu/
  target_config/specs/*.txtpb (`device_memory_size`, `memory_bandwidth`).
[nvidia] NVIDIA's data sheets of the chip and of its DGX system.
"""

import dataclasses
from typing import Any

from fusionlab.errors import UserError, nearest

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Torus:
  """Links between neighbouring TPU chips.

  Attributes:
    dimensions: 2 or 3; a chip has two links in each.
    link_bytes_per_s: of one link in one direction.
    wraps_at: a dimension of a slice is a ring where its chips are a multiple of
      this ([book] chapter 2: a whole 16 on v5e and v6e; 4 on v4, v5p and 7x), and
      a line else.
  """

  dimensions: int
  link_bytes_per_s: float
  wraps_at: int


@dataclasses.dataclass(frozen=True)
class Switched:
  """A node of GPUs behind switches, and a network between nodes.

  Attributes:
    node_bytes_per_s: what one GPU sends into its node, one direction.
    node_size: GPUs of a node.
    network_bytes_per_s: what one GPU sends to other nodes. An assumption about
      the site: the DGX system's own network cards, one for each GPU.
  """

  node_bytes_per_s: float
  node_size: int
  network_bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator, as one jax device.

  Attributes:
    name: what configurations call it.
    kinds: parts of `device.device_kind`.
    flops_per_s: dense bfloat16 matrix products.
    hbm_bytes: TPU: what a program can have; GPU: what the device reports, of
      which jax takes 75% unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
      None: not sourced.
    hbm_bytes_per_s: None: not sourced.
    interconnect: None: not sourced, or none.
    sources: of the figures, as the module lists them.
  """

  name: str
  kinds: tuple[str, ...]
  flops_per_s: float
  hbm_bytes: float | None = None
  hbm_bytes_per_s: float | None = None
  interconnect: Torus | Switched | None = None
  sources: str = ""


CHIPS: tuple[Chip, ...] = (
  Chip(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    flops_per_s=197e12,
    hbm_bytes=15.75 * _GIB,
    # [gcp] said 819 GB/s and now says 800 GiB/s (859e9); [book] has 8.2e11.
    hbm_bytes_per_s=819e9,
    # 400 GB/s, 4 ports.
    interconnect=Torus(2, 50e9, wraps_at=16),
    sources="[gcp] v5e; memory [libtpu]; rings [book] 2",
  ),
  Chip(
    name="v5p",
    kinds=("TPU v5p", "TPU v5"),
    flops_per_s=459e12,
    hbm_bytes=95.74 * _GIB,
    hbm_bytes_per_s=2765e9,
    # 1200 GB/s; six links, as a 3D torus has.
    interconnect=Torus(3, 100e9, wraps_at=4),
    sources="[gcp] v5p; memory [libtpu]; rings [book] 2",
  ),
  Chip(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    flops_per_s=918e12,
    hbm_bytes=31.25 * _GIB,
    hbm_bytes_per_s=1638e9,
    # 800 GB/s, 4 ports.
    interconnect=Torus(2, 100e9, wraps_at=16),
    sources="[gcp] v6e; memory [libtpu]; rings [book] 2",
  ),
  Chip(
    name="v4",
    kinds=("TPU v4",),
    flops_per_s=275e12,
    # libtpu compiles for single cores only; twice a core's 15.25 GiB.
    hbm_bytes=30.5 * _GIB,
    hbm_bytes_per_s=1200e9,
    # [gcp] gives none for v4.
    interconnect=Torus(3, 45e9, wraps_at=4),
    sources="[gcp] v4; memory [libtpu]; links and rings [book] 2",
  ),
  Chip(
    # One of the chip's two cores: half of its 2307e12, 7.4e12 and links.
    name="7x",
    kinds=("TPU7x", "TPU v7x"),
    flops_per_s=2307e12 / 2,
    hbm_bytes=94.75 * _GIB,
    hbm_bytes_per_s=7.4e12 / 2,
    interconnect=Torus(3, 90e9 / 2, wraps_at=4),
    sources="[gcp] tpu7x; memory [libtpu]; bandwidths and rings [book] 2",
  ),
  Chip(
    name="h100",
    kinds=("H100",),
    flops_per_s=989e12,
    hbm_bytes=84_942_979_072,
    hbm_bytes_per_s=3.352e12,
    # 18 links of 25e9; 8 network cards of 400 Gb/s for 8 GPUs.
    interconnect=Switched(450e9, 8, network_bytes_per_s=50e9),
    sources="[book] 12; memory and bandwidth [xla] h100_sxm",
  ),
  Chip(
    name="h200",
    kinds=("H200",),
    flops_per_s=989e12,
    hbm_bytes=151_397_597_184,
    hbm_bytes_per_s=4.8e12,
    interconnect=Switched(450e9, 8, network_bytes_per_s=50e9),
    sources=(
      "[book] 12; memory and bandwidth [xla] h200; links and network: NVIDIA's"
      " H200-SXM-141GBx8 in github.com/mlcommons/inference_results_v4.1"
    ),
  ),
  Chip(
    name="b200",
    kinds=("B200",),
    flops_per_s=2250e12,
    # [book] and DGX B200 have 8e12.
    hbm_bytes=191_514_411_008,
    hbm_bytes_per_s=7.672e12,
    interconnect=Switched(900e9, 8, network_bytes_per_s=50e9),
    sources="[book] 12; memory and bandwidth [xla] b200",
  ),
  Chip(
    name="a100",
    kinds=("A100",),
    flops_per_s=312e12,
    hbm_bytes=85_100_068_864,
    hbm_bytes_per_s=2.039e12,
    # 12 links of 25e9; network cards of 200 Gb/s.
    interconnect=Switched(300e9, 8, network_bytes_per_s=25e9),
    sources=(
      "[book] 12; memory and bandwidth [xla] a100_sxm_80; network [nvidia] DGX"
      " A100, not checked"
    ),
  ),
  # For MFU alone; peaks from [nvidia], not checked again.
  Chip(name="h100_pcie", kinds=("H100 PCIe",), flops_per_s=756e12),
  Chip(name="h100_nvl", kinds=("H100 NVL",), flops_per_s=835e12),
  Chip(name="l40s", kinds=("L40S",), flops_per_s=362e12),
  Chip(name="l4", kinds=("L4",), flops_per_s=121e12),
  Chip(name="v100", kinds=("V100",), flops_per_s=125e12),
)


def chip(name: str) -> Chip:
  """Returns a chip by name.

  Raises:
    UserError: an unknown name, with the nearest.
  """
  for known in CHIPS:
    if known.name == name:
      return known
  names = [known.name for known in CHIPS]
  raise UserError(f"unknown chip {name!r}{nearest(name, names)}")


def chip_of(device: Any) -> Chip | None:
  """The chip of a device, by the longest part of its kind; None if unknown.

  Args:
    device: a `jax.Device`.
  """
  found = [
    (len(kind), known)
    for known in CHIPS
    for kind in known.kinds
    if kind in device.device_kind
  ]
  return max(found, key=lambda pair: pair[0])[1] if found else None


def peak_flops(device: Any) -> float | None:
  """Peak FLOPs/s of a device; None where it is not known (every CPU).

  Args:
    device: a `jax.Device`.
  """
  known = chip_of(device)
  return known.flops_per_s if known else None
