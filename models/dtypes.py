"""Number formats of checkpoints: safetensors' names, numpy carriers and exact conversions without a framework.

numpy has no bfloat16 or 8-bit floats, so they travel as bit patterns: BF16 as uint16, the 8-bit floats as uint8. The
conversions here are exact where the target can hold the value and round once, to nearest even, where it cannot.
Sources: the safetensors format (dtype names), OCP 8-bit floating point 1.0 (E4M3, E5M2), OCP microscaling (E8M0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bits8 = NDArray[np.uint8]
Bits16 = NDArray[np.uint16]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class DType:
    """A safetensors dtype. ``carrier`` is the little-endian numpy type of one element; None below one byte."""

    name: str
    bits: int
    carrier: np.dtype | None


def _table(*rows: tuple[str, int, str | None]) -> dict[str, DType]:
    return {name: DType(name, bits, np.dtype(carrier) if carrier else None) for name, bits, carrier in rows}


DTYPES = _table(
    ("BOOL", 8, "u1"),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "u1"),
    ("I8", 8, "i1"),
    ("F8_E5M2", 8, "u1"),
    ("F8_E4M3", 8, "u1"),
    ("F8_E8M0", 8, "u1"),
    ("F8_E4M3FNUZ", 8, "u1"),
    ("F8_E5M2FNUZ", 8, "u1"),
    ("I16", 16, "<i2"),
    ("U16", 16, "<u2"),
    ("F16", 16, "<f2"),
    ("BF16", 16, "<u2"),
    ("I32", 32, "<i4"),
    ("U32", 32, "<u4"),
    ("F32", 32, "<f4"),
    ("C64", 64, "<c8"),
    ("F64", 64, "<f8"),
    ("I64", 64, "<i8"),
    ("U64", 64, "<u8"),
)

F8_E4M3_MAX = 448.0
F8_E4M3FNUZ_MAX = 240.0


def bf16_to_f32(bits: Bits16) -> Float32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Float32) -> Bits16:
    """Round to nearest even; overflow becomes infinity, denormals stay, a NaN stays a (quiet) NaN of the same sign."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps only for NaNs, which are replaced below
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def _small_float_table(mantissa_bits: int, bias: int) -> Float32:
    """Values of the 256 codes of an 8-bit float whose every code is finite; callers patch the special codes."""
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias)
    )  # subnormals have no hidden one
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


def _read_only(table: Float32) -> Float32:
    table.flags.writeable = False
    return table


def _e4m3() -> Float32:
    table = _small_float_table(3, bias=7)
    table[[0x7F, 0xFF]] = np.nan
    return _read_only(table)


def _e4m3fnuz() -> Float32:
    table = _small_float_table(3, bias=8)
    table[0x80] = np.nan
    return _read_only(table)


def _e8m0() -> Float32:
    table = np.ldexp(1.0, np.arange(256) - 127)
    table[0xFF] = np.nan
    return _read_only(table.astype(np.float32))


# The FP32 value of each of the 256 codes.
F8_E4M3_VALUES = _e4m3()
F8_E4M3FNUZ_VALUES = _e4m3fnuz()
F8_E8M0_VALUES = _e8m0()
F8_E5M2_VALUES = _read_only((np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32))
I8_VALUES = _read_only(np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32))


def f8_e4m3_to_f32(codes: Bits8) -> Float32:
    """E4M3 "fn": no infinities, 0x7F and 0xFF are NaN."""
    return F8_E4M3_VALUES[codes]


def f8_e4m3fnuz_to_f32(codes: Bits8) -> Float32:
    """AMD MI300's variant: one zero, 0x80 is the only NaN, every other code is half of what E4M3 means."""
    return F8_E4M3FNUZ_VALUES[codes]


def f8_e8m0_to_f32(codes: Bits8) -> Float32:
    """Powers of two, 2 ** (code - 127); 0xFF is NaN."""
    return F8_E8M0_VALUES[codes]


def f32_to_f8_e4m3(values: Float32) -> Bits8:
    """Round to nearest even, subnormals included; magnitudes above 448, infinities too, become 448; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    codes = _round_to_e4m3(values, bias=7, limit=F8_E4M3_MAX)
    codes |= np.signbit(values).view(np.uint8) << np.uint8(7)
    codes[np.isnan(values)] = 0x7F
    return codes


def f32_to_f8_e4m3fnuz(values: Float32) -> Bits8:
    """As `f32_to_f8_e4m3` with the limit 240; what rounds to zero gives the only zero."""
    values = np.asarray(values, np.float32)
    codes = _round_to_e4m3(values, bias=8, limit=F8_E4M3FNUZ_MAX)
    codes[np.signbit(values) & (codes != 0)] |= np.uint8(0x80)
    codes[np.isnan(values)] = 0x80
    return codes


def _round_to_e4m3(values: Float32, bias: int, limit: float) -> Bits8:
    """Codes of the magnitudes, sign bit clear."""
    with np.errstate(invalid="ignore"):  # what NaNs become is replaced by the caller
        magnitude = np.minimum(np.abs(values), np.float32(limit))
        # FP32 keeps 23 bits after the leading one and a code 3: in a sum with the 2 ** 20 fold of its own power of two
        # a magnitude's last bit is the code's. Below the smallest normal the spacing stays that of the smallest normal.
        shift = (magnitude.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        shift = np.maximum(shift, np.float32(2.0 ** (1 - bias))) * np.float32(2.0**20)
        magnitude += shift
        magnitude -= shift
        # With FP32's bias exchanged for the code's, the code is the top of the bit pattern, subnormals included.
        magnitude *= np.float32(2.0 ** (bias - 127))
    return (magnitude.view(np.uint32) >> 20).astype(np.uint8)


_TO_F32: dict[str, Callable[[NDArray], Float32]] = {
    "F32": lambda array: array.astype(np.float32, copy=False),
    "F16": lambda array: array.astype(np.float32),
    "BF16": bf16_to_f32,
    "F8_E4M3": f8_e4m3_to_f32,
    "F8_E4M3FNUZ": f8_e4m3fnuz_to_f32,
    "F8_E5M2": lambda array: F8_E5M2_VALUES[array],
    "F8_E8M0": f8_e8m0_to_f32,
}
FLOATS = tuple(_TO_F32)


def to_f32(array: NDArray, dtype: str) -> Float32:
    """FP32 values of a carrier array of one of the `FLOATS`."""
    return _TO_F32[dtype](array)
