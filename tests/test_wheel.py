"""The wheel holds the library alone, and README's snippet runs from it."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Written by the first version of the checkpoint format; never changed.
FIXTURE = ROOT / "tests" / "train" / "fixtures" / "checkpoint_v1"


def run(*words: object, cwd: pathlib.Path, **env: str) -> str:
  clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  # One device, as a reader has.
  flags = os.environ["XLA_FLAGS"].split()
  flags = " ".join(flag for flag in flags if "device_count" not in flag)
  done = subprocess.run(
    [str(word) for word in words],
    cwd=cwd,
    env={**clean, "XLA_FLAGS": flags, **env},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Builds from the tracked files, so that nothing else can slip in."""
  source = tmp_path_factory.mktemp("source")
  listed = run(
    "git",
    "ls-files",
    "-z",
    "--cached",
    "--others",
    "--exclude-standard",
    cwd=ROOT,
  )
  for name in filter(None, listed.split("\0")):
    if (ROOT / name).is_file():
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes((ROOT / name).read_bytes())
  out = tmp_path_factory.mktemp("wheel")
  run(
    sys.executable,
    "-m",
    "pip",
    "wheel",
    source,
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--quiet",
    "-w",
    out,
    cwd=out,
  )
  (found,) = out.glob("*.whl")
  return found


def test_the_wheel_holds_the_library_and_its_files(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  rooms = {name.split("/")[0] for name in names}
  assert {r for r in rooms if not r.endswith(".dist-info")} == {
    "fusionlab",
    "kernels_pallas",
  }
  expected = {
    str(path.relative_to(ROOT))
    for room in ("fusionlab", "kernels_pallas")
    for suffix in ("py", "json", "safetensors", "html", "css")
    for path in (ROOT / room).rglob(f"*.{suffix}")
  }
  assert expected <= set(names)
  assert any(name.endswith("licenses/LICENSE") for name in names)
  assert wheel.stat().st_size < 4 * 2**20


def snippet(page: str) -> str:
  """The Python of a page, in order, as one program."""
  text = (ROOT / page).read_text(encoding="utf-8")
  return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


SNIPPETS = {
  "README.md": "float('lion' in told.text)",
  "docs/guides/library.md": "loss",
}


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_run_from_the_installed_wheel(wheel, tmp_path, page):
  environment = tmp_path / "env"
  run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
  python = environment / "bin" / "python"
  run(
    sys.executable,
    "-m",
    "pip",
    "--python",
    python,
    "install",
    "--no-deps",
    "--no-index",
    "--quiet",
    wheel,
    cwd=tmp_path,
  )
  # The dependencies come from here, read-only; .pth files of that folder (an
  # editable install of the repository) are not read.
  installed = sysconfig.get_paths()["purelib"]
  (site,) = environment.glob("lib/python3*/site-packages")
  (site / "dependencies.pth").write_text(installed)
  code = snippet(page)
  assert '"runs/demo"' in code
  code = code.replace('"runs/demo"', repr(str(FIXTURE)))
  code += f"\nprint(fusionlab.__file__, {SNIPPETS[page]})\n"
  (tmp_path / "snippet.py").write_text(code)
  said = run(python, "snippet.py", cwd=tmp_path)
  file, number = said.splitlines()[-1].split()
  assert pathlib.Path(file).is_relative_to(environment)
  assert 0.0 <= float(number) < 20.0
