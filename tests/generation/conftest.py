"""Compiled once and without optimizations, as the trainer's tests are."""

import jax
import pytest

from tests.train.conftest import _compile_once, _compile_quickly

__all__ = ["_compile_once", "_compile_quickly"]


@pytest.fixture
def optimized():
  """For what is asked of the compiler itself."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
