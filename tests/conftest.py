"""What every test runs under: 8 CPU devices, and types checked at each call."""

import gc
import importlib.metadata
import os

# Seldom, for JAX keeps what it traced: Python's own threshold visits those
# millions of objects again and again, a sixth of all time, to free next to
# nothing.
gc.set_threshold(50_000, 20, 100)
# Before jax is imported by anything. A test's programs run a few times at most,
# so compiling them quickly is worth more than running them quickly. MLIR's
# emitters take three times as long as the older ones, which later releases do
# not have (and where an unknown flag ends the process).
_OLD_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    *["--xla_cpu_use_fusion_emitters=false"] * _OLD_EMITTERS,
  ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jaxtyping

import tests.typecheck  # noqa: F401  (the hook looks it up by name)

jaxtyping.install_import_hook(
  ["fusionlab", "kernels_pallas"], "tests.typecheck.check"
)

import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]


# The files that take longest begin first, so that all workers end together.
_LONGEST = (
  "train/test_processes.py",
  "sharding/test_every_mesh.py",
  "models/test_mixture_of_transformers.py",
  "train/test_step.py",
  "train/test_loop.py",
  "train/test_resume.py",
  "experiments/test_benchmarks.py",
  "test_wheel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the longest files first; the others keep their order."""
  paths = [ROOT / "tests" / name for name in _LONGEST]
  items.sort(
    key=lambda item: (
      paths.index(item.path) if item.path in paths else len(paths)
    )
  )


def pytest_collection_finish() -> None:
  """Modules and tests stay: they need no visit."""
  gc.freeze()


def pytest_sessionfinish() -> None:
  """Nor does anything at the end, when pytest collects garbage itself."""
  gc.freeze()


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The repository."""
  return ROOT


@pytest.fixture(autouse=True)
def _own_cache(
  tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
  """Keeps prepared data and compiled programs out of the user's cache.

  One folder for the whole session: what one test prepared serves the next.
  """
  cache = tmp_path_factory.getbasetemp() / "cache"
  monkeypatch.setenv("FUSIONLAB_CACHE", str(cache))
  yield


@pytest.fixture(scope="session")
def compiler_options() -> dict[str, bool]:
  """For `.compile` where its text is read: the emitters that a user has.

  The older ones take every scatter apart.
  """
  return {"xla_cpu_use_fusion_emitters": True} if _OLD_EMITTERS else {}


@pytest.fixture
def cache_dir(tmp_path: pathlib.Path) -> pathlib.Path:
  """An empty folder for prepared data."""
  folder = tmp_path / "cache"
  folder.mkdir()
  return folder
