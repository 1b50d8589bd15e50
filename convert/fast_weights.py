"""CheckpointWeights with the compiled kernels where the ``speed`` extra is installed; the same bits either way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import Bits8, Bits16, Float32
from . import speed
from .formats import Range
from .transposing import contiguous
from .weights import CheckpointWeights

Pair = tuple[int, int]


class FastWeights(CheckpointWeights):
    """Reads FP8 blocks as BF16 at the speed of memory; everything else as CheckpointWeights does."""

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        if not self._is_fast(name, dtype):
            return super().read(name, dtype, rows, cols)
        return _dequantised(*self._window(name, rows, cols))

    def read_transposed(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """``read(...).T``, contiguous."""
        if not self._is_fast(name, dtype):
            return contiguous(super().read(name, dtype, rows, cols).T)
        codes_NK, scales_RC, block, origin = self._window(name, rows, cols)
        # turned as codes, which are half as many bytes as what they mean
        return _dequantised(contiguous(codes_NK.T), np.ascontiguousarray(scales_RC.T), block[::-1], origin[::-1])

    def _is_fast(self, name: str, dtype: str) -> bool:
        return speed.HAS_KERNELS and self.stored(name).format == "fp8_block" and dtype == "bf16"

    def _window(self, name: str, rows: Range | None, cols: Range | None) -> tuple[Bits8, Float32, Pair, Pair]:
        """Codes, scales of the blocks that they touch, the blocks' size, and where the codes begin."""
        parts, block = self.parts(name, rows, cols), self.stored(name).block
        assert block is not None
        return parts["weight"], parts["weight_scale_inv"], block, ((rows or (0, 0))[0], (cols or (0, 0))[0])


def _dequantised(codes_NK: Bits8, scales_RC: Float32, block: Pair, origin: Pair) -> Bits16:
    from . import kernels  # numba takes a second to import

    return kernels.fp8_to_bf16(codes_NK, scales_RC, block, origin)
