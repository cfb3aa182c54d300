"""Compiling is what these tests pay for: once, and without optimizations."""

import jax
import pytest

from fusionlab.train.environment import keep_compiled
from tests.train import fakes


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
  keep_compiled(tmp_path_factory.getbasetemp() / "cache" / "compile")
  # A tiny model's step takes less to compile than what a user waits for.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="package", autouse=True)
def _compile_quickly():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def fake_data(monkeypatch):
  """Puts the synthetic loaders in the place of the data room."""
  monkeypatch.setattr("fusionlab.train.setup.open_data", fakes.open_fake_data)
