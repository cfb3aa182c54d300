"""The table of chips is whole, consistent and found by name and by kind."""

import dataclasses

import pytest

from fusionlab.analysis.devices import (
  CHIPS,
  Switched,
  Torus,
  chip,
  chip_of,
  peak_flops,
)
from fusionlab.errors import UserError


@dataclasses.dataclass
class _Device:
  device_kind: str


# As libtpu and CUDA name them.
_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "TPU7x": "7x",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H100 PCIe": "h100_pcie",
  "NVIDIA H100 NVL": "h100_nvl",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
  "NVIDIA L4": "l4",
  "NVIDIA L40S": "l40s",
  "Tesla V100-SXM2-16GB": "v100",
}


@pytest.mark.parametrize(("kind", "name"), _KINDS.items())
def test_a_device_is_found_by_its_kind(kind, name):
  """'TPU v5 lite' is no 'TPU v5', an L40S no L4."""
  found = chip_of(_Device(kind))
  assert found is chip(name)
  assert peak_flops(_Device(kind)) == found.flops_per_s


def test_every_chip_is_reached_by_some_kind():
  """Nothing in the table is shadowed; a CPU is not in it."""
  assert set(_KINDS.values()) == {c.name for c in CHIPS}
  assert chip_of(_Device("cpu")) is None
  assert peak_flops(_Device("cpu")) is None


def test_an_unknown_chip_names_the_nearest():
  """One line that helps."""
  with pytest.raises(
    UserError, match=r"unknown chip 'h10', did you mean 'h100'"
  ):
    chip("h10")


@pytest.mark.parametrize(
  ("name", "whole"),
  # Bytes/s of a chip over all links and both directions, as Google has them.
  [("v5e", 400e9), ("v6e", 800e9), ("v5p", 1200e9)],
)
def test_links_add_up_to_the_chips_bandwidth(name, whole):
  """Two links in each dimension, two directions in each link."""
  torus = chip(name).interconnect
  assert isinstance(torus, Torus)
  assert 2 * 2 * torus.dimensions * torus.link_bytes_per_s == whole


@pytest.mark.parametrize("known", CHIPS, ids=lambda c: c.name)
def test_ridges_are_those_of_such_chips(known):
  """Figures in the wrong unit would be off by 1,000."""
  if known.hbm_bytes is None:
    assert known.hbm_bytes_per_s is known.interconnect is None
    return
  assert known.sources
  assert 100 < known.flops_per_s / known.hbm_bytes_per_s < 600
  seconds_to_read_all = known.hbm_bytes / known.hbm_bytes_per_s
  assert 0.015 < seconds_to_read_all < 0.05
  wires = known.interconnect
  if isinstance(wires, Switched):
    assert wires.network_bytes_per_s < wires.node_bytes_per_s
    assert wires.node_bytes_per_s < known.hbm_bytes_per_s / 5
