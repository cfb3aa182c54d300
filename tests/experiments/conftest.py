"""Compiled once and without optimizations, as the trainer's tests are."""

from tests.train.conftest import _compile_once, _compile_quickly

__all__ = ["_compile_once", "_compile_quickly"]
