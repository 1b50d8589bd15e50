"""`models.quantise` of BF16 weights, compiled by numba (the ``speed`` extra): the same codes and scales.

The largest magnitude of BF16 patterns is that of the largest integer below their signs. Quotients are rounded to
integers by adding and subtracting 1.5 * 2 ** 23, whose sum with a small number has no fraction bits. Each loop does one
thing to a row, so that compilers turn it into vector instructions.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..models.dtypes import Bits8, Bits16, Float32, bf16_to_f32, f32_to_bf16
from ..models.quant import BLOCK, Int8, block_grid
from ..models.quantise import compressed_tensors_scales, fp8_scales, int8_scales


def quantise_int8_channels(weight_NK: Bits16, bf16_scales: bool = False) -> tuple[Int8, Float32]:
    scales_N1 = int8_scales(_amax(weight_NK, (1, weight_NK.shape[1])), bf16_scales)
    q_NK = np.empty(weight_NK.shape, np.int8)
    _int8(weight_NK, scales_N1[:, 0], np.float32(-127), False, q_NK)
    return q_NK, scales_N1


def quantise_int8_compressed_tensors(weight_NK: Bits16) -> tuple[Int8, Bits16]:
    scales_N1 = compressed_tensors_scales(_amax(weight_NK, (1, weight_NK.shape[1])))
    q_NK = np.empty(weight_NK.shape, np.int8)
    _int8(weight_NK, scales_N1[:, 0], np.float32(-128), True, q_NK)
    return q_NK, f32_to_bf16(scales_N1)


def quantise_fp8_blocks(weight_NK: Bits16) -> tuple[Bits8, Float32]:
    scales_RC = fp8_scales(_amax(weight_NK, BLOCK))
    codes_NK = np.empty(weight_NK.shape, np.uint8)
    _fp8(weight_NK, scales_RC, BLOCK, codes_NK)
    return codes_NK, scales_RC


def _amax(weight_NK: Bits16, block: tuple[int, int]) -> Float32:
    largest_RC: NDArray[np.uint16] = np.zeros(block_grid(weight_NK.shape, block), np.uint16)
    _largest(weight_NK, block, largest_RC)
    return bf16_to_f32(largest_RC)


@njit(nogil=True, cache=True, error_model="numpy")
def _largest(weight, block, largest):  # type: ignore[no-untyped-def]
    rows, columns = weight.shape
    for row in range(rows):
        for c in range(largest.shape[1]):
            part = weight[row, c * block[1] : min((c + 1) * block[1], columns)]
            found = np.uint16(0)
            for k in range(part.shape[0]):
                found = max(found, np.uint16(part[k] & np.uint16(0x7FFF)))
            largest[row // block[0], c] = max(largest[row // block[0], c], found)


@njit(nogil=True, cache=True, error_model="numpy")
def _int8(weight, scales, low, through_bf16, out):  # type: ignore[no-untyped-def]
    rows, columns = weight.shape
    words = np.empty(columns, np.uint32)
    values = words.view(np.float32)
    whole = np.float32(12582912)
    for row in range(rows):
        weight_K, out_K, scale = weight[row], out[row], scales[row]
        for k in range(columns):
            words[k] = np.uint32(weight_K[k]) << np.uint32(16)
        for k in range(columns):
            values[k] = values[k] / scale
        if through_bf16:
            for k in range(columns):
                odd = (words[k] >> np.uint32(16)) & np.uint32(1)
                words[k] = (words[k] + odd + np.uint32(0x7FFF)) & np.uint32(0xFFFF0000)
        for k in range(columns):
            rounded = (values[k] + whole) - whole
            out_K[k] = np.int8(min(max(rounded, low), np.float32(127)))


@njit(nogil=True, cache=True, error_model="numpy")
def _fp8(weight, scales, block, out):  # type: ignore[no-untyped-def]
    """`models.dtypes.f32_to_f8_e4m3` of the quotients."""
    rows, columns = weight.shape
    words, shifts = np.empty(block[1], np.uint32), np.empty(block[1], np.uint32)
    values, large = words.view(np.float32), shifts.view(np.float32)
    for row in range(rows):
        for c in range(scales.shape[1]):
            first, last = c * block[1], min((c + 1) * block[1], columns)
            weight_K, out_K, scale = weight[row, first:last], out[row, first:last], scales[row // block[0], c]
            size = last - first
            for k in range(size):
                words[k] = np.uint32(weight_K[k] & np.uint16(0x7FFF)) << np.uint32(16)
            for k in range(size):
                values[k] = min(values[k] / scale, np.float32(448))
            for k in range(size):
                power = max(words[k] & np.uint32(0x7F800000), np.uint32((127 - 6) << 23))
                shifts[k] = power + np.uint32(20 << 23)
            for k in range(size):
                values[k] = ((values[k] + large[k]) - large[k]) * np.float32(2.0**-120)
            for k in range(size):
                sign = np.uint32(weight_K[k] >> np.uint16(8)) & np.uint32(0x80)
                out_K[k] = np.uint8((words[k] >> np.uint32(20)) | sign)
