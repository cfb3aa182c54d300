"""Held-out tests train a little: they compile as the trainer's tests do."""

from tests.train.conftest import _compile_once, _compile_quickly

__all__ = ["_compile_once", "_compile_quickly"]
