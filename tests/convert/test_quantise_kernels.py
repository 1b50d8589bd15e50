"""The compiled quantisers give the bits of `models.quantise`, whatever the weights are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deepspan.convert import quantise_kernels
from deepspan.models import quantise
from deepspan.models.dtypes import f32_to_bf16

NAMES = ["quantise_int8_channels", "quantise_int8_compressed_tensors", "quantise_fp8_blocks"]


def same(name: str, bits: np.ndarray, **options) -> None:
    expected, got = getattr(quantise, name)(bits, **options), getattr(quantise_kernels, name)(bits, **options)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (128, 128), (300, 576), (3, 20_000)])
@pytest.mark.parametrize("spread", [0.0, 8.0])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_any_spread(name: str, spread: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_t(3, shape) * np.exp(spread * rng.standard_normal(shape))
    bits = f32_to_bf16(np.clip(values, -1e38, 1e38).astype(np.float32))
    same(name, bits)
    bits[0] = 0
    same(name, bits)


FINITE = st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F)


@settings(max_examples=150, deadline=None)
@given(bits=hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FINITE))
@pytest.mark.parametrize("name", NAMES)
def test_any_finite_patterns(name: str, bits: np.ndarray) -> None:
    same(name, bits)


def test_rounded_scales() -> None:
    bits = f32_to_bf16(np.random.default_rng(6).standard_normal((64, 500)).astype(np.float32))
    same("quantise_int8_channels", bits, bf16_scales=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_shows_in_the_scales(name: str) -> None:
    for pattern in (0x7F80, 0xFF80, 0x7FC0):
        bits = np.zeros((3, 200), np.uint16)
        bits[1, 150] = pattern
        scales = getattr(quantise_kernels, name)(bits)[1]
        exponents = scales >> 7 & 0xFF if scales.dtype == np.uint16 else scales.view(np.uint32) >> 23 & 0xFF
        assert (exponents == 0xFF).any()
