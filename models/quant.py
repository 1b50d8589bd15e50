"""Low-bit weight formats as pure functions on numpy arrays: the definition that kernels and converters must equal.

This file says what stored codes mean; `quantise` makes them.

Logical weights are [N, K] = [out, in]. A stored code's value times its FP32 scale is one FP32 product; "bf16" results
are that product rounded once, to nearest even. Multiplying in BF16 would round twice. NaN codes and scales give NaN.
Work is done in strips that fit a CPU cache: temporaries of a whole matrix cost several times the memory and the time.

Shape letters: N rows (out), K columns (in), R and C rows and columns of blocks, G groups of input channels.
Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.3), AutoGPTQ's and AutoAWQ's GEMM layouts, compressed-tensors'
pack-quantized layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dtypes import F8_E4M3_VALUES, I8_VALUES, Bits8, Float32, f32_to_bf16

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


def strips(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix in runs that fit a CPU cache."""
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
        for strip in strips(stop - start, codes_NK.shape[1]):
            rows = slice(start + strip.start, start + strip.stop)
            # "clip" because the indices are right by construction and "raise" would copy the result
            np.take(table, codes_NK[rows] + first_code_K, out=out[rows], mode="clip")
    return out


def dequant_int8_blocks(
    q_NK: Int8, scales_RC: Float32, dtype: str, block: tuple[int, int] = BLOCK, origin: tuple[int, int] = (0, 0)
) -> NDArray:
    """Weights of signed bytes with one scale per block; see `dequant_fp8_blocks` for ``origin``."""
    return dequant_fp8_blocks(q_NK.view(np.uint8), scales_RC, dtype, block, origin, I8_VALUES)


# INT8 channels ------------------------------------------------------------------------------------------------------


def dequant_int8_channels(q_NK: Int8, scales_N1: Float32, dtype: str, offsets_N1: Float32 | None = None) -> NDArray:
    """(q - offset) * scale, with scales and offsets of [N, 1]."""
    assert scales_N1.shape == (q_NK.shape[0], 1), f"scales {scales_N1.shape}, weight {q_NK.shape}"
    out = np.empty(q_NK.shape, result_dtype(dtype))
    for rows in strips(*q_NK.shape):
        values = q_NK[rows].astype(np.float32)
        if offsets_N1 is not None:
            values -= offsets_N1[rows]
        values *= scales_N1[rows]
        out[rows] = round_to(values, dtype)
    return out


# INT4 ---------------------------------------------------------------------------------------------------------------

_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble p of a word holds column 8j + AWQ_ORDER[p]
_PLAIN_ORDER = tuple(range(8))


class StoredInt4(NamedTuple):
    """A 4-bit weight, or a slice of it, as a checkpoint stores it.

    ``layout`` is gptq, awq or ct_int4, whose ``parts`` `dequant_gptq`, `dequant_awq` and `dequant_packed_int4` explain;
    scales are FP32 and of all groups. ``skip`` rows and columns of the parts lie ahead of the slice, because words hold
    eight; ``first_column`` is where the slice begins in the weight.
    """

    layout: str
    parts: dict[str, NDArray]
    group_size: int
    zeros_minus_one: bool
    shape: tuple[int, int]
    skip: tuple[int, int]
    first_column: int


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
    for words in strips(qweight.shape[0], 8 * qweight.shape[1]):
        channels = slice(8 * words.start, 8 * words.stop)
        q_KN = unpack_int4(qweight[words], axis=0)
        out[:, channels] = _affine(q_KN, zeros_GN, scales_GN, group_of_K[channels], dtype).T
    return out


def dequant_awq(qweight: Int32, qzeros: Int32, scales_GN: Float32, group_of_K: Int32, dtype: str) -> NDArray:
    """(q - z[g]) * s[g] as [N, K]; qweight [K, N/8] and qzeros [G, N/8] are packed along N in AWQ's nibble order."""
    zeros_GN = unpack_int4(qzeros, 1, AWQ_ORDER)
    out = np.empty((8 * qweight.shape[1], qweight.shape[0]), result_dtype(dtype))
    for channels in strips(qweight.shape[0], 8 * qweight.shape[1]):
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
    for strip in strips(rows, channels):
        values = unpack_int4(packed[strip], axis=1)[:, :channels].astype(np.float32)
        values -= np.float32(8) if zeros_NG is None else zeros_NG[strip][:, group_of_K]
        values *= scales_NG[strip][:, group_of_K]
        out[strip] = round_to(values, dtype)
    return out
