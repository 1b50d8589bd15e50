"""Values that no sound checkpoint holds: tensors of zeros alone, NaNs, infinities, scales that are not positive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import FLOATS, to_f32

# Last components of names. Scales multiply or divide weights; what may be zero shifts them, or tells their order.
_SCALES = {"weight_scale_inv", "weight_scale", "scale", "scales", "input_scale", "deq_scale", "dequant_scale"}
_MAY_BE_ZERO = {
    "bias", "e_score_correction_bias", "topk_bias", "quant_bias", "beta", "weight_offset", "input_offset", "input_zp",
    "input_zero_point", "weight_zero_point", "qzeros", "g_idx", "weight_g_idx",
}  # fmt: skip


@dataclass(frozen=True)
class _Pattern:
    """Bits of a float: all but the sign, infinity's (None: there is none), the first of the NaNs'."""

    magnitude: int
    infinity: int | None
    nan: int


_PATTERNS = {
    "F64": _Pattern(0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    "F32": _Pattern(0x7FFF_FFFF, 0x7F80_0000, 0x7F80_0001),
    "BF16": _Pattern(0x7FFF, 0x7F80, 0x7F81),
    "F16": _Pattern(0x7FFF, 0x7C00, 0x7C01),
    "F8_E5M2": _Pattern(0x7F, 0x7C, 0x7D),
    "F8_E4M3": _Pattern(0x7F, None, 0x7F),
}
_NAN_CODES = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}  # where one code alone is NaN


@dataclass(frozen=True)
class Values:
    """What a piece of a tensor holds; the sum of its pieces' is the whole tensor's."""

    has_nonzero: bool = False
    nans: int = 0
    infinities: int = 0
    not_positive: int = 0  # of a scale's

    def __add__(self, other: Values) -> Values:
        return Values(
            self.has_nonzero or other.has_nonzero,
            self.nans + other.nans,
            self.infinities + other.infinities,
            self.not_positive + other.not_positive,
        )

    def faults(self, name: str) -> Iterator[str]:
        """What is wrong with a tensor that holds these."""
        if self.nans:
            yield f"{self.nans:,} NaN"
        if self.infinities:
            yield f"{self.infinities:,} infinite"
        if self.not_positive:
            yield f"{self.not_positive:,} scales that are not positive"
        elif not self.has_nonzero and not self.nans and _last(name) not in _MAY_BE_ZERO:
            yield "all zero"


def values_of(name: str, dtype: str, data: NDArray) -> Values:
    """``data`` are carriers of ``dtype``, which may be overwritten."""
    if dtype not in FLOATS and dtype not in _PATTERNS and dtype not in _NAN_CODES:
        if _last(name) in _SCALES and dtype == "I64":  # Ascend's FP32 patterns in 64 bits
            return _of_float("F32", data.astype(np.int32).view(np.float32), is_scale=True)
        return Values(has_nonzero=bool(data.any()))
    return _of_float(dtype, data, is_scale=_last(name) in _SCALES)


def _of_float(dtype: str, data: NDArray, is_scale: bool) -> Values:
    not_positive = 0
    if is_scale and dtype in FLOATS:
        values = to_f32(data, dtype)
        not_positive = int(np.count_nonzero(values <= 0))  # NaNs are counted as such
    if dtype in _NAN_CODES:
        nans = int(np.count_nonzero(data == _NAN_CODES[dtype]))
        return Values(dtype == "F8_E8M0" or bool(data.any()), nans, 0, not_positive)
    pattern = _PATTERNS[dtype]
    bits = data.view(f"u{data.itemsize}")
    bits &= bits.dtype.type(pattern.magnitude)
    largest = int(bits.max(initial=0))
    nans = int(np.count_nonzero(bits >= pattern.nan)) if largest >= pattern.nan else 0
    has_infinity = pattern.infinity is not None and largest >= pattern.infinity
    infinities = int(np.count_nonzero(bits == pattern.infinity)) if has_infinity else 0
    return Values(largest > 0, nans, infinities, not_positive)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
