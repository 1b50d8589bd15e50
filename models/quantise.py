"""Making low-bit codes: weights and activations in, codes and scales out, by rounding to nearest even.

Weights [N, K] = [out, in] come as float32 or as BF16 bit patterns (uint16) and are worked on in strips that fit a CPU
cache, so that nothing is held but the input and the result. What the codes mean is in `quant`. Shape letters: N rows
(out), K columns (in), R and C rows and columns of blocks, G groups of input channels.
Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.3); compressed-tensors' and msModelSlim's conventions as noted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .dtypes import F8_E4M3_MAX, Bits8, Bits16, Float32, bf16_to_f32, f32_to_bf16, f32_to_f8_e4m3, to_f32
from .quant import BLOCK, Int8, Int32, block_grid, strips

Weight = Float32 | Bits16


def _f32(weight: Weight) -> Float32:
    return to_f32(weight, "BF16" if weight.dtype == np.uint16 else "F32")


def power_of_two_above(scales: Float32) -> Float32:
    """The ue8m0 form of positive scales: 2 ** ceil(log2 s), exactly."""
    mantissa, exponent = np.frexp(scales)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)


def _scales(amax: Float32, limit: float, ue8m0: bool = False) -> Float32:
    """amax / limit; 1 where everything is zero, and never so small that dividing by it loses the weight."""
    scales = amax.astype(np.float32) / np.float32(limit)
    scales = np.where(amax == 0, np.float32(1), np.maximum(scales, np.float32(2.0**-126)))
    return power_of_two_above(scales) if ue8m0 else scales


def _round_int8(values: Float32, low: int = -127) -> Int8:
    """Works in ``values``."""
    np.rint(values, out=values)
    np.clip(values, low, 127, out=values)
    return values.astype(np.int8)


# Blocks -------------------------------------------------------------------------------------------------------------


def _block_amax(weight_NK: Weight, block: tuple[int, int]) -> Float32:
    amax_RC = np.empty(block_grid(weight_NK.shape, block), np.float32)
    starts = np.arange(amax_RC.shape[1]) * block[1]
    for r in range(len(amax_RC)):
        row_K = np.zeros(weight_NK.shape[1], np.float32)
        block_row = weight_NK[r * block[0] : (r + 1) * block[0]]
        for rows in strips(*block_row.shape):
            np.maximum(row_K, np.abs(_f32(block_row[rows])).max(axis=0), out=row_K)
        amax_RC[r] = np.maximum.reduceat(row_K, starts)
    return amax_RC


def _quotients(weight_NK: Weight, scales_RC: Float32, block: tuple[int, int]) -> Iterator[tuple[slice, Float32]]:
    """Runs of rows and their weights divided by the scales."""
    for r, scales_C in enumerate(scales_RC):
        scales_K = np.repeat(scales_C, block[1])[: weight_NK.shape[1]]
        start, stop = r * block[0], min((r + 1) * block[0], len(weight_NK))
        for strip in strips(stop - start, weight_NK.shape[1]):
            rows = slice(start + strip.start, start + strip.stop)
            yield rows, _f32(weight_NK[rows]) / scales_K


def fp8_scales(amax: Float32, ue8m0: bool = False) -> Float32:
    """amax / 448, or the power of two above it."""
    return _scales(amax, F8_E4M3_MAX, ue8m0)


def quantise_fp8_blocks(
    weight_NK: Weight, block: tuple[int, int] = BLOCK, ue8m0: bool = False
) -> tuple[Bits8, Float32]:
    """F8_E4M3 codes and their multipliers [R, C], amax / 448; with ``ue8m0`` these are powers of two."""
    scales_RC = fp8_scales(_block_amax(weight_NK, block), ue8m0)
    codes_NK = np.empty(weight_NK.shape, np.uint8)
    for rows, quotients in _quotients(weight_NK, scales_RC, block):
        codes_NK[rows] = f32_to_f8_e4m3(quotients)
    return codes_NK, scales_RC


def quantise_int8_blocks(weight_NK: Weight, block: tuple[int, int] = BLOCK) -> tuple[Int8, Float32]:
    """Symmetric codes in -127..127 and scales [R, C]."""
    scales_RC = _scales(_block_amax(weight_NK, block), 127)
    q_NK = np.empty(weight_NK.shape, np.int8)
    for rows, quotients in _quotients(weight_NK, scales_RC, block):
        q_NK[rows] = _round_int8(quotients)
    return q_NK, scales_RC


# Channels -----------------------------------------------------------------------------------------------------------


def _row_amax(values_NK: Float32) -> Float32:
    return np.abs(values_NK).max(axis=1, keepdims=True, initial=0)


def int8_scales(amax: Float32, bf16_scales: bool = False) -> Float32:
    """amax / 127, rounded to BF16 where layouts store it so."""
    scales = _scales(amax, 127)
    return bf16_to_f32(f32_to_bf16(scales)) if bf16_scales else scales


def compressed_tensors_scales(amax: Float32) -> Float32:
    """amax / 127.5 in BF16; 2 ** -7, BF16's machine epsilon, where that is zero."""
    scales = bf16_to_f32(f32_to_bf16(amax / np.float32(127.5)))
    scales[scales == 0] = 2.0**-7
    return scales


def quantise_int8_channels(weight_NK: Weight, bf16_scales: bool = False) -> tuple[Int8, Float32]:
    """Symmetric codes in -127..127 and scales [N, 1], amax / 127: msModelSlim's, DeepSeek-on-Ascend's, Meituan's.

    With ``bf16_scales`` the scales are rounded to BF16 before the codes are made.
    """
    q_NK, scales_N1 = np.empty(weight_NK.shape, np.int8), np.empty((weight_NK.shape[0], 1), np.float32)
    for rows in strips(*weight_NK.shape):
        values = _f32(weight_NK[rows])
        scales_N1[rows] = int8_scales(_row_amax(values), bf16_scales)
        q_NK[rows] = _round_int8(values / scales_N1[rows])
    return q_NK, scales_N1


def quantise_int8_compressed_tensors(weight_NK: Bits16) -> tuple[Int8, Bits16]:
    """Codes in -128..127 and BF16 scales [N, 1], both bit for bit those that compressed-tensors makes of BF16 weights.

    It computes in BF16: the quotient is rounded to BF16 before it is rounded to an integer.
    """
    q_NK, scales_N1 = np.empty(weight_NK.shape, np.int8), np.empty((weight_NK.shape[0], 1), np.uint16)
    for rows in strips(*weight_NK.shape):
        values = bf16_to_f32(weight_NK[rows])
        scales = compressed_tensors_scales(_row_amax(values))
        scales_N1[rows] = f32_to_bf16(scales)
        values /= scales
        _round_to_bf16(values)
        q_NK[rows] = _round_int8(values, low=-128)
    return q_NK, scales_N1


def _round_to_bf16(values: Float32) -> None:
    """In place; finite values only."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    np.add(bits, odd, out=bits)
    bits += 0x7FFF
    bits &= 0xFFFF0000


def static_int8_companions(
    q_NK: Int8, weight_scales_N1: Float32, input_scale: float, input_offset: int
) -> tuple[Float32, Int32]:
    """deq_scale [N] and quant_bias [N] of a layer whose input is round(x / input_scale + input_offset) in -128..127.

    The layer's output is (x_q @ q.T + quant_bias) * deq_scale: Ascend's W8A8 form of a layer without a bias.
    """
    sums_N = np.empty(len(q_NK), np.int64)
    for rows in strips(*q_NK.shape):
        sums_N[rows] = q_NK[rows].sum(axis=1, dtype=np.int64)
    return np.float32(input_scale) * weight_scales_N1[:, 0], (-input_offset * sums_N).astype(np.int32)


# INT4 ---------------------------------------------------------------------------------------------------------------


def quantise_int4_groups(
    weight_NK: Float32, group_size: int, symmetric: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Float32]:
    """Codes [N, K] and zero points [N, G], both in 0..15, and scales [N, G].

    The weight is (code - zero point) * scale; symmetric groups have the zero point 8.
    """
    starts = np.arange(0, weight_NK.shape[1], group_size)
    low_NG = np.minimum(np.minimum.reduceat(weight_NK, starts, axis=1), 0)
    high_NG = np.maximum(np.maximum.reduceat(weight_NK, starts, axis=1), 0)
    if symmetric:
        scales_NG = _scales(np.maximum(-low_NG, high_NG), 7.5)
        zeros_NG = np.full(scales_NG.shape, 8, np.float32)
    else:
        scales_NG = _scales(high_NG - low_NG, 15)
        zeros_NG = np.clip(np.rint(-low_NG / scales_NG), 0, 15)
    spread = [_spread(array, group_size, weight_NK.shape[1]) for array in (scales_NG, zeros_NG)]
    codes_NK = np.clip(np.rint(weight_NK / spread[0]) + spread[1], 0, 15)
    return codes_NK.astype(np.uint8), zeros_NG.astype(np.uint8), scales_NG


# Activations --------------------------------------------------------------------------------------------------------


def quantise_activation_fp8(
    x: Float32, group: int = 128, ue8m0: bool = False, floor: float = 1e-4
) -> tuple[Bits8, Float32]:
    """Codes [..., K] and scales [..., ceil(K / group)]; each group's amax is at least ``floor``."""
    amax = np.maximum(_group_amax(x, group), np.float32(floor))
    scales = _scales(amax, F8_E4M3_MAX, ue8m0)
    return f32_to_f8_e4m3(x / _spread(scales, group, x.shape[-1])), scales


def quantise_activation_int8(x: Float32, group: int | None = None, floor: float = 1e-10) -> tuple[Int8, Float32]:
    """Codes [..., K] and scales [..., G]: per token (G = 1), or per ``group`` channels of a token."""
    group = group or x.shape[-1]
    scales = _scales(np.maximum(_group_amax(x, group), np.float32(floor)), 127)
    return _round_int8(x / _spread(scales, group, x.shape[-1])), scales


def _group_amax(x: Float32, group: int) -> Float32:
    return np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[-1], group), axis=-1)


def _spread(scales: Float32, group: int, channels: int) -> Float32:
    return np.repeat(scales, group, axis=-1)[..., :channels]
