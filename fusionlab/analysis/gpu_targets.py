"""Descriptions of GPUs that are not there, from which XLA compiles for them."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

from fusionlab.analysis.devices import Chip, chip_of
from fusionlab.errors import UserError

# Figures of the table's chips that are committed, by the chip's name.
_SHIPPED = Path(__file__).parent / "targets"
_HOW = (
  "XLA writes one as *.gpu_target_config.pbtxt where it compiles on the card with"
  " XLA_FLAGS=--xla_dump_to=FOLDER"
)


@dataclasses.dataclass(frozen=True)
class GpuTarget:
  """A GPU as XLA describes it.

  Attributes:
    name: what CUDA calls it, 'NVIDIA H100 80GB HBM3'.
    chip: of the table, with this card's memory and bandwidth: a part of a card
      (MIG) has less of both.
    text: the description, a `GpuTargetConfigProto` in protobuf's text format.
    file: where it was read.
  """

  name: str
  chip: Chip
  text: str
  file: str


def read_target(chip: str, file: str = "") -> GpuTarget:
  """Reads the description of a GPU.

  Args:
    chip: the name in `fusionlab.analysis.devices` that it must describe.
    file: the description; default the committed one of the chip.

  Raises:
    UserError: no such file, one that is no description, or that of another chip.
  """
  path = Path(file) if file else _SHIPPED / f"{chip}.txtpb"
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is no text"
    raise UserError(f"--target_config={file}: {reason}; {_HOW}") from error
  found = {
    key: re.search(rf'^\s*{key}:\s*"?([^"\n]+?)"?\s*$', text, re.MULTILINE)
    for key in ("name", "device_memory_size", "memory_bandwidth")
  }
  lacking = [key for key, match in found.items() if match is None]
  if lacking:
    raise UserError(
      f"--target_config={file} describes no GPU: it lacks {', '.join(lacking)};"
      f" {_HOW}"
    )
  name, memory, bandwidth = (match[1] for match in found.values() if match)
  known = chip_of(SimpleNamespace(device_kind=name))
  if known is None or known.name != chip:
    raise UserError(
      f"--target_config={file} describes {name!r}, and config.mesh.preset is of"
      f" {chip} chips"
    )
  return GpuTarget(
    name=name,
    chip=dataclasses.replace(
      known,
      hbm_bytes=_number(memory, file),
      hbm_bytes_per_s=_number(bandwidth, file),
    ),
    text=text,
    file=str(path),
  )


def _number(text: str, file: str) -> float:
  if not text.isdigit():
    raise UserError(
      f"--target_config={file}: {text!r} is no number of bytes; {_HOW}"
    )
  return float(text)
