"""`manifest.json` of a prepared source: what it was made from, and checksums."""

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fusionlab.data.documents import Counts
from fusionlab.errors import UserError
from fusionlab.tokenizers import Tokenizers

FORMAT = 1
COUNTS_ARRAYS = ("parts", "part_modality", "part_alternatives", "lengths")


def write_manifest(
  folder: Path,
  origin: dict,
  splits: Sequence[str],
  arrays: dict[str, np.ndarray],
  tokenizers: Tokenizers,
) -> None:
  """Writes what the folder was made from, its totals and its checksums.

  Args:
    folder: holds all other files of the prepared source.
    origin: format, name, fingerprint and tokenizers.
    splits: names of the splits.
    arrays: `<split>/<array>` -> the shapes of all records, see `Counts`.
    tokenizers: of the run.
  """
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  totals = {}
  for split in splits:
    counts = Counts(**{n: arrays[f"{split}/{n}"] for n in COUNTS_ARRAYS})
    modality = np.repeat(counts.part_modality, counts.part_alternatives)
    tokens = np.bincount(
      modality, counts.lengths, len(tokenizers.vocabulary.modalities)
    )
    totals[split] = {
      "records": len(counts),
      "tokens_of_all_alternatives": {
        name: int(n)
        for name, n in zip(
          tokenizers.vocabulary.modalities, tokens, strict=True
        )
      },
    }
  manifest = {
    **origin,
    "splits": totals,
    "versions": {
      name: metadata.version(name)
      for name in ("tensorflow-datasets", "array-record", "numpy")
    },
    "files": {
      p.relative_to(folder).as_posix(): {
        "bytes": p.stat().st_size,
        "sha256": _sha256(p),
      }
      for p in files
    },
  }
  manifest["checksum"] = _checksum(manifest)
  text = json.dumps(manifest, indent=2, sort_keys=False) + "\n"
  (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
  """Reads `manifest.json` and holds the folder's files to it.

  Sizes of all files are checked, and the content of all but the records, whose
  blocks array_record checks as they are read.

  Raises:
    UserError: something is missing or changed.
  """
  try:
    content = (folder / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(content)
    expected = manifest.pop("checksum")
    if _checksum(manifest) != expected:
      damaged(folder, "manifest.json does not have its checksum")
  except (OSError, ValueError, KeyError, AttributeError) as error:
    damaged(folder, "manifest.json cannot be read", error)
  for name, file in manifest["files"].items():
    path = folder / name
    if not path.is_file():
      damaged(folder, f"{name} is missing")
    if path.stat().st_size != file["bytes"]:
      damaged(folder, f"{name} does not have its {file['bytes']} bytes")
    if "array_record" in name:
      continue
    if _sha256(path) != file["sha256"]:
      damaged(folder, f"{name} does not have its checksum")
  return manifest


def _checksum(manifest: dict[str, Any]) -> str:
  canonical = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(
  folder: Path, what: str, error: Exception | None = None
) -> NoReturn:
  """Raises UserError: what is wrong with a prepared folder, and the way out."""
  reason = f" ({' '.join(str(error).split())[:200]})" if error else ""
  raise UserError(
    f"the prepared dataset {folder} is damaged: {what}{reason}; delete that"
    f" folder and it will be prepared again"
  ) from error
