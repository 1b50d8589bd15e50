"""The compiled CRC-32 against zlib's, on every length around the sizes that it folds."""

import zlib

import numpy as np
import pytest

from deepspan.convert import fast_checksums, speed
from deepspan.convert.checksums import crc32

RAW = np.random.default_rng(0).integers(0, 256, (1 << 20) + 77, np.uint8)
LENGTHS = [*range(70), *range(250, 330), 1000, 4096, 12_345, len(RAW) - 8]


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("start", [0, 1, 8])
def test_the_checksum_is_zlibs(monkeypatch, has_kernels, start):
    monkeypatch.setattr(speed, "HAS_KERNELS", has_kernels)
    for length in LENGTHS:
        piece = RAW[start : start + length]
        assert crc32(piece) == zlib.crc32(piece.tobytes()), length


def test_a_processor_without_carry_less_products(monkeypatch):
    monkeypatch.setattr(fast_checksums, "HAS_CARRYLESS_PRODUCT", False)
    assert crc32(RAW) == zlib.crc32(RAW.tobytes())


def test_memory_that_must_not_be_written():
    assert crc32(np.frombuffer(RAW.tobytes(), np.uint8)) == zlib.crc32(RAW.tobytes())
