"""Attention with one interval of visible keys per query."""

from kernels_pallas.attention.api import attention

__all__ = ["attention"]
