"""Attention with one interval of visible keys per query."""

from kernels_pallas.attention.api import (
  RefusedError,
  attention,
  recorded_choices,
)

__all__ = ["RefusedError", "attention", "recorded_choices"]
