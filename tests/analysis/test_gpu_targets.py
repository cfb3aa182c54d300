"""Descriptions of GPUs: the committed one, a user's own, and what is none."""

import pathlib

import pytest

from fusionlab.analysis.devices import chip
from fusionlab.analysis.gpu_targets import read_target
from fusionlab.errors import UserError
from fusionlab.sharding.mesh import PRESETS


@pytest.mark.parametrize(
  "name", sorted({p.chip for p in PRESETS.values() if not p.topology})
)
def test_every_gpu_of_a_preset_has_a_description_that_agrees(name):
  """With the table of chips, which has other sources for the rest."""
  target = read_target(name)
  assert target.chip.hbm_bytes == chip(name).hbm_bytes
  assert target.chip.hbm_bytes_per_s == pytest.approx(
    chip(name).hbm_bytes_per_s, rel=1e-3
  )
  assert target.text.isascii()
  assert pathlib.Path(target.file).name == f"{name}.txtpb"


def test_a_part_of_a_card_has_the_memory_that_it_says(tmp_path):
  """As XLA dumps it of a seventh of an H100."""
  text = (
    read_target("h100")
    .text.replace("H100 80GB HBM3", "H100 80GB HBM3 MIG 1g.10gb")
    .replace("84942979072", "10468982784")
  )
  file = tmp_path / "mig.pbtxt"
  file.write_text(text)
  target = read_target("h100", str(file))
  assert target.name == "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
  assert target.chip.hbm_bytes == 10_468_982_784
  assert target.chip.flops_per_s == chip("h100").flops_per_s


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (None, "No such file"),
    (b"\xff\xfe", "it is no text"),
    (b"", "lacks name, device_memory_size, memory_bandwidth"),
    (b'name: "NVIDIA H100"\nmemory_bandwidth: 1\n', "lacks device_memory_size"),
    (
      b'name: "NVIDIA H100"\nmemory_bandwidth: 1\ndevice_memory_size: 80GB\n',
      "'80GB' is no number of bytes",
    ),
    (
      b'name: "NVIDIA H200"\nmemory_bandwidth: 1\ndevice_memory_size: 1\n',
      "describes 'NVIDIA H200', and config.mesh.preset is of h100 chips",
    ),
  ],
)
def test_what_is_no_description_is_refused_by_name(tmp_path, content, said):
  file = tmp_path / "card.pbtxt"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(UserError) as caught:
    read_target("h100", str(file))
  message = str(caught.value)
  assert f"--target_config={file}" in message
  assert said in message
  assert "\n" not in message
