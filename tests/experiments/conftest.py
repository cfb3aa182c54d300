"""Compiled once and without optimizations, as the trainer's tests are."""

import pytest

from tests.experiments.launching import bash_with
from tests.train.conftest import _compile_once, _compile_quickly

__all__ = ["_compile_once", "_compile_quickly"]


@pytest.fixture
def bash(tmp_path):
  """Runs bash with fake commands in front of PATH."""
  return bash_with(tmp_path)
