"""Low-bit weight formats as pure functions on numpy arrays: the definition that kernels and converters must equal.

Logical weights are [N, K] = [out, in]. A stored code's value times its FP32 scale is one FP32 product; "bf16" results
are that product rounded once, to nearest even. Multiplying in BF16 would round twice. NaN codes and scales give NaN.
Work is done in strips that fit a CPU cache: temporaries of a whole matrix cost several times the memory and the time.

Shape letters: N rows (out), K columns (in), R and C rows and columns of blocks, G groups of input channels.
Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.3), AutoGPTQ's and AutoAWQ's GEMM layouts, compressed-tensors'
pack-quantized layout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dtypes import F8_E4M3_MAX, F8_E4M3_VALUES, I8_VALUES, Bits8, Float32, f32_to_bf16, f32_to_f8_e4m3

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]

BLOCK = (128, 128)
_STRIP = 1 << 16  # elements worked on at a time


def block_grid(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Rows and columns of blocks; the last ones may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def result_dtype(dtype: str) -> np.dtype:
    """The numpy type that holds "f32" or "bf16" results."""
    return np.dtype({"f32": np.float32, "bf16": np.uint16}[dtype])


def round_to(values: Float32, dtype: str) -> NDArray:
    """FP32 values as "f32" (unchanged) or as "bf16" bit patterns."""
    return f32_to_bf16(values) if dtype == "bf16" else values


def _strips(rows: int, columns: int) -> list[slice]:
    step = max(1, _STRIP // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


# FP8 and INT8 blocks ------------------------------------------------------------------------------------------------


def dequant_fp8_blocks(
    codes_NK: Bits8,
    scales_RC: Float32,
    dtype: str,
    block: tuple[int, int] = BLOCK,
    origin: tuple[int, int] = (0, 0),
    values: Float32 = F8_E4M3_VALUES,
) -> NDArray:
    """Weights of codes with one scale per block.

    ``codes_NK`` may be a slice of the matrix that starts at row and column ``origin``; ``scales_RC`` then covers the
    blocks that the slice touches. ``values`` are the FP32 values of the 256 codes.
    """
    first = origin[0] // block[0], origin[1] // block[1]
    end = origin[0] + codes_NK.shape[0], origin[1] + codes_NK.shape[1]
    touched = block_grid((end[0] - first[0] * block[0], end[1] - first[1] * block[1]), block)
    assert scales_RC.shape == touched, f"scales {scales_RC.shape}, blocks {touched}"
    out = np.empty(codes_NK.shape, result_dtype(dtype))
    # Scale times all 256 values, rounded, for one row of blocks; then every weight is one look-up.
    first_code_K = ((np.arange(origin[1], end[1]) // block[1]) - first[1]) * 256
    for r in range(touched[0]):
        start = max((first[0] + r) * block[0] - origin[0], 0)
        stop = min((first[0] + r + 1) * block[0] - origin[0], codes_NK.shape[0])
        with np.errstate(over="ignore", invalid="ignore"):
            table = round_to(scales_RC[r, :, None] * values, dtype).reshape(-1)
        for strip in _strips(stop - start, codes_NK.shape[1]):
            rows = slice(start + strip.start, start + strip.stop)
            # "clip" because the indices are right by construction and "raise" would copy the result
            np.take(table, codes_NK[rows] + first_code_K, out=out[rows], mode="clip")
    return out


def dequant_int8_blocks(
    q_NK: Int8, scales_RC: Float32, dtype: str, block: tuple[int, int] = BLOCK, origin: tuple[int, int] = (0, 0)
) -> NDArray:
    """Weights of signed bytes with one scale per block; see `dequant_fp8_blocks` for ``origin``."""
    return dequant_fp8_blocks(q_NK.view(np.uint8), scales_RC, dtype, block, origin, I8_VALUES)


def power_of_two_above(scales: Float32) -> Float32:
    """The ue8m0 form of positive scales: 2 ** ceil(log2 s), exactly."""
    mantissa, exponent = np.frexp(scales)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)


def _scales(amax: Float32, limit: float, ue8m0: bool = False) -> Float32:
    """amax / limit; 1 where everything is zero, and never so small that dividing by it loses the weight."""
    scales = amax.astype(np.float32) / np.float32(limit)
    scales = np.where(amax == 0, np.float32(1), np.maximum(scales, np.float32(2.0**-126)))
    return power_of_two_above(scales) if ue8m0 else scales


def _block_amax(weight_NK: Float32, block: tuple[int, int]) -> Float32:
    rows, columns = block_grid(weight_NK.shape, block)
    amax_RC = np.empty((rows, columns), np.float32)
    starts = np.arange(columns) * block[1]
    for r in range(rows):
        row_K = np.abs(weight_NK[r * block[0] : (r + 1) * block[0]]).max(axis=0)
        amax_RC[r] = np.maximum.reduceat(row_K, starts)
    return amax_RC


def _divide_by_block(weight_NK: Float32, scales_RC: Float32, block: tuple[int, int], rows: slice) -> Float32:
    scales_K = np.repeat(scales_RC[np.arange(rows.start, rows.stop) // block[0]], block[1], axis=1)
    return weight_NK[rows] / scales_K[:, : weight_NK.shape[1]]


def quantise_fp8_blocks(
    weight_NK: Float32, block: tuple[int, int] = BLOCK, ue8m0: bool = False
) -> tuple[Bits8, Float32]:
    """F8_E4M3 codes and their multipliers [R, C]; with ``ue8m0`` the multipliers are powers of two."""
    scales_RC = _scales(_block_amax(weight_NK, block), F8_E4M3_MAX, ue8m0)
    codes_NK = np.empty(weight_NK.shape, np.uint8)
    for rows in _strips(*weight_NK.shape):
        codes_NK[rows] = f32_to_f8_e4m3(_divide_by_block(weight_NK, scales_RC, block, rows))
    return codes_NK, scales_RC


def quantise_int8_blocks(weight_NK: Float32, block: tuple[int, int] = BLOCK) -> tuple[Int8, Float32]:
    """Symmetric codes in -127..127 and scales [R, C]."""
    scales_RC = _scales(_block_amax(weight_NK, block), 127)
    q_NK = np.empty(weight_NK.shape, np.int8)
    for rows in _strips(*weight_NK.shape):
        q_NK[rows] = _round_int8(_divide_by_block(weight_NK, scales_RC, block, rows))
    return q_NK, scales_RC


def _round_int8(values: Float32) -> Int8:
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


# INT8 channels ------------------------------------------------------------------------------------------------------


def quantise_int8_channels(weight_NK: Float32) -> tuple[Int8, Float32]:
    """Symmetric codes in -127..127 and scales [N, 1], by rounding to nearest."""
    q_NK, scales_N1 = np.empty(weight_NK.shape, np.int8), np.empty((weight_NK.shape[0], 1), np.float32)
    for rows in _strips(*weight_NK.shape):
        scales_N1[rows] = _scales(np.abs(weight_NK[rows]).max(axis=1, keepdims=True), 127)
        q_NK[rows] = _round_int8(weight_NK[rows] / scales_N1[rows])
    return q_NK, scales_N1


def dequant_int8_channels(q_NK: Int8, scales_N1: Float32, dtype: str, offsets_N1: Float32 | None = None) -> NDArray:
    """(q - offset) * scale, with scales and offsets of [N, 1]."""
    assert scales_N1.shape == (q_NK.shape[0], 1), f"scales {scales_N1.shape}, weight {q_NK.shape}"
    out = np.empty(q_NK.shape, result_dtype(dtype))
    for rows in _strips(*q_NK.shape):
        values = q_NK[rows].astype(np.float32)
        if offsets_N1 is not None:
            values -= offsets_N1[rows]
        values *= scales_N1[rows]
        out[rows] = round_to(values, dtype)
    return out


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


# INT4 ---------------------------------------------------------------------------------------------------------------

_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble p of a word holds column 8j + AWQ_ORDER[p]
_PLAIN_ORDER = tuple(range(8))


def pack_int4(values: NDArray, axis: int, order: tuple[int, ...] = _PLAIN_ORDER) -> Int32:
    """Words of eight 4-bit values of 0..15 along ``axis``, lowest nibble first; the tail is padded with zeros."""
    moved = np.moveaxis(values.astype(np.uint32), axis, -1)
    padding = -moved.shape[-1] % 8
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, padding)])
    eights = moved.reshape(*moved.shape[:-1], moved.shape[-1] // 8, 8)[..., list(order)]
    words = np.bitwise_or.reduce(eights << _SHIFTS, axis=-1).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def unpack_int4(words: Int32, axis: int, order: tuple[int, ...] = _PLAIN_ORDER) -> NDArray[np.uint8]:
    """The inverse of `pack_int4`, padding included: ``axis`` becomes eight times as long."""
    moved = np.moveaxis(words.view(np.uint32), axis, -1)
    nibbles = ((moved[..., None] >> _SHIFTS) & 15).astype(np.uint8)
    eights = np.empty_like(nibbles)
    eights[..., list(order)] = nibbles
    return np.moveaxis(eights.reshape(*moved.shape[:-1], 8 * moved.shape[-1]), -1, axis)


def groups(channels: int, group_size: int) -> Int32:
    """The group of each input channel when channels are in their natural order."""
    return np.arange(channels, dtype=np.int32) // np.int32(group_size)


def unpack_gptq_zeros(qzeros: Int32, stores_minus_one: bool) -> NDArray[np.uint8]:
    """Zero points [G, N]. v1 files store z - 1 modulo 16 (``stores_minus_one``), v2 files store z."""
    return np.bitwise_and(unpack_int4(qzeros, axis=1) + np.uint8(stores_minus_one), np.uint8(15))


def dequant_gptq(
    qweight: Int32, qzeros: Int32, scales_GN: Float32, group_of_K: Int32, stores_minus_one: bool, dtype: str
) -> NDArray:
    """(q - z[g]) * s[g] as [N, K], with g = ``group_of_K`` (g_idx: not sorted when act-order was used).

    qweight [K/8, N] is packed along K, qzeros [G, N/8] along N.
    """
    zeros_GN = unpack_gptq_zeros(qzeros, stores_minus_one)
    out = np.empty((qweight.shape[1], 8 * qweight.shape[0]), result_dtype(dtype))
    for words in _strips(qweight.shape[0], 8 * qweight.shape[1]):
        channels = slice(8 * words.start, 8 * words.stop)
        q_KN = unpack_int4(qweight[words], axis=0)
        out[:, channels] = _affine(q_KN, zeros_GN, scales_GN, group_of_K[channels], dtype).T
    return out


def dequant_awq(qweight: Int32, qzeros: Int32, scales_GN: Float32, group_of_K: Int32, dtype: str) -> NDArray:
    """(q - z[g]) * s[g] as [N, K]; qweight [K, N/8] and qzeros [G, N/8] are packed along N in AWQ's nibble order."""
    zeros_GN = unpack_int4(qzeros, 1, AWQ_ORDER)
    out = np.empty((8 * qweight.shape[1], qweight.shape[0]), result_dtype(dtype))
    for channels in _strips(qweight.shape[0], 8 * qweight.shape[1]):
        q_KN = unpack_int4(qweight[channels], 1, AWQ_ORDER)
        out[:, channels] = _affine(q_KN, zeros_GN, scales_GN, group_of_K[channels], dtype).T
    return out


def _affine(
    q_KN: NDArray[np.uint8], zeros_GN: NDArray[np.uint8], scales_GN: Float32, group_of_K: Int32, dtype: str
) -> NDArray:
    values_KN = q_KN.astype(np.float32)
    values_KN -= zeros_GN[group_of_K]
    values_KN *= scales_GN[group_of_K]
    return round_to(values_KN, dtype)


def dequant_packed_int4(
    packed: Int32, scales_NG: Float32, group_of_K: Int32, dtype: str, packed_zeros: Int32 | None = None
) -> NDArray:
    """compressed-tensors' pack-quantized weights as [N, K]: (q - 8) * s[g], or (q - z) * s[g] with zero points.

    packed [N, ceil(K/8)] is packed along K, packed_zeros [ceil(N/8), G] along N; both hold the signed value plus 8.
    """
    rows, channels = packed.shape[0], len(group_of_K)
    out = np.empty((rows, channels), result_dtype(dtype))
    zeros_NG = None if packed_zeros is None else unpack_int4(packed_zeros, axis=0)[:rows]
    for strip in _strips(rows, channels):
        values = unpack_int4(packed[strip], axis=1)[:, :channels].astype(np.float32)
        values -= np.float32(8) if zeros_NG is None else zeros_NG[strip][:, group_of_K]
        values *= scales_NG[strip][:, group_of_K]
        out[strip] = round_to(values, dtype)
    return out


def quantise_int4_groups(
    weight_NK: Float32, group_size: int, symmetric: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Float32]:
    """Codes [N, K] and zero points [N, G], both in 0..15, and scales [N, G], by rounding to nearest.

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
