"""CheckpointWeights with the compiled kernels where the ``speed`` extra is installed; the same bits either way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import Bits8, Bits16, Float32
from . import speed
from .formats import Range
from .pages import empty_pages
from .transposing import contiguous, put
from .weights import CheckpointWeights

Pair = tuple[int, int]

_STRIP_BYTES = 1 << 20  # what stays in a cache between being turned and being read again


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
        return _dequantised_in_strips(codes_NK.T, np.ascontiguousarray(scales_RC.T), block[::-1], origin[::-1])

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


def _dequantised_in_strips(codes_KN: Bits8, scales_CR: Float32, block: Pair, origin: Pair) -> Bits16:
    """Of a transposed view: turned as codes, which are half as many bytes as what they mean, into a cache."""
    from . import kernels

    rows = -(-_STRIP_BYTES // (block[0] * max(1, codes_KN.shape[1]))) * block[0]  # whole blocks
    start = origin[0] % block[0]
    out_KN = empty_pages(codes_KN.shape, np.uint16)
    strip_KN = np.empty((min(rows, len(codes_KN)), codes_KN.shape[1]), np.uint8)
    for first in range(-start, len(codes_KN), rows):
        begin, end = max(0, first), min(first + rows, len(codes_KN))
        turned = strip_KN[: end - begin]
        put(turned, codes_KN[begin:end])
        scales = scales_CR[(start + begin) // block[0] : -(-(start + end) // block[0])]
        kernels.fp8_to_bf16(turned, scales, block, (origin[0] + begin, origin[1]), out=out_KN[begin:end])
    return out_KN
