"""Attention with one interval of visible keys per query."""

from kernels_pallas.attention.api import RefusedError, attention

__all__ = ["RefusedError", "attention"]
