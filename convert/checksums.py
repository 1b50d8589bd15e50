"""CRC-32 of tensors that are made and read in pieces, in any order: the same number as zlib.crc32 of the whole.

CRC-32 is linear over GF(2), so the checksum of a whole follows from those of its parts and their lengths
(the technique of zlib's crc32_combine).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from . import speed

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is the coefficient of x ** 0
_ONE = 1 << 31


def crc32(data: NDArray[np.uint8]) -> int:
    """`zlib.crc32` of a contiguous array, several times as fast where the ``speed`` extra is installed."""
    if not speed.HAS_KERNELS:
        return zlib.crc32(data.data)
    from . import fast_checksums  # numba takes a second to import

    return fast_checksums.crc32(data)


def combined_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """The checksum of consecutive parts, each given as (its crc32, its length in bytes)."""
    whole = 0
    for crc, length in parts:
        whole = _times(power_of_x(8 * length), whole) ^ crc
    return whole


@lru_cache(maxsize=4096)
def power_of_x(exponent: int) -> int:
    """x ** exponent modulo the polynomial; x ** (8 * n) is what appending n bytes multiplies a checksum by."""
    result, power = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _times(power, result)
        power = _times(power, power)
        exponent >>= 1
    return result


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        a = (a << 1) & 0xFFFFFFFF
    return product
