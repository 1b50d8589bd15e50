"""Quantisers by name: the compiled ones where the ``speed`` extra is installed, or those of `models.quantise`."""

from __future__ import annotations

from types import ModuleType

from ..models import quantise
from . import speed


def quantisers() -> ModuleType:
    """A module with quantise_int8_channels, quantise_int8_compressed_tensors and quantise_fp8_blocks."""
    if not speed.HAS_KERNELS:
        return quantise
    from . import quantise_kernels  # numba takes a second to import

    return quantise_kernels
