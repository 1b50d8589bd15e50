"""The compiled loops against the definitions of `models.quant`, bit for bit, in both of their forms."""

import numpy as np
import pytest

from deepspan.convert import kernels
from deepspan.models.quant import block_grid, dequant_fp8_blocks

FORMS = [True, False] if kernels.HAS_PERMUTATION else [False]


def codes(shape: tuple[int, int], nan: bool = False) -> np.ndarray:
    found = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return found if nan else np.where(found & 0x7F == 0x7F, np.uint8(0x80), found)


def scales(shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    return np.exp(np.random.default_rng(1).normal(-7, 3, block_grid(shape, block))).astype(np.float32).clip(1e-20, 60)


@pytest.mark.parametrize("permute", FORMS)
@pytest.mark.parametrize("origin", [(0, 0), (3, 0), (0, 5), (70, 130)])
@pytest.mark.parametrize("block", [(128, 128), (16, 8), (1, 300)])
@pytest.mark.parametrize("shape", [(1, 1), (129, 257), (576, 300), (200, 31)])
def test_fp8_to_bf16(shape, block, origin, permute):
    whole = codes(shape)
    scale = scales(shape, block)
    window = np.ascontiguousarray(whole[origin[0] :, origin[1] :])
    if not window.size:
        return
    touched = scale[origin[0] // block[0] :, origin[1] // block[1] :]
    expected = dequant_fp8_blocks(window, touched, "bf16", block, origin)
    np.testing.assert_array_equal(kernels.fp8_to_bf16(window, touched, block, origin, permute), expected)


@pytest.mark.parametrize("permute", FORMS)
def test_every_code_with_every_mantissa_of_a_scale(permute):
    """All roundings: a scale's seven mantissa bits that BF16 keeps, the next two, and a sticky one."""
    mantissas = np.arange(1024) * 2.0**-10 + 1 + (np.arange(1024) % 3) * 2.0**-20
    scale = (mantissas * 2.0**-9).astype(np.float32)[:, None]
    table = np.tile(codes((1, 256)) * 0 + np.arange(256, dtype=np.uint8), (1024, 1))
    table[:, [0x7F, 0xFF]] = 0
    expected = dequant_fp8_blocks(table, scale, "bf16", (1, 256))
    np.testing.assert_array_equal(kernels.fp8_to_bf16(table, scale, (1, 256), (0, 0), permute), expected)


@pytest.mark.parametrize("permute", FORMS)
@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-130, 2.0**120, np.inf, np.nan, 1.0])
def test_unusual_scales_and_nan_codes(scale, permute):
    values = codes((130, 70), nan=True)
    grid = np.full((2, 1), scale, np.float32)
    with np.errstate(all="ignore"):
        expected = dequant_fp8_blocks(values, grid, "bf16")
        np.testing.assert_array_equal(kernels.fp8_to_bf16(values, grid, (128, 128), (0, 0), permute), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 144), (208, 304), (128, 128), (144, 48), (1024, 272)])
def test_transpose(shape, dtype):
    source = np.random.default_rng(0).integers(0, 2**16, shape).astype(dtype)
    out = np.zeros((shape[1], shape[0] + 8), dtype)
    inside = out[:, 4:-4]
    assert kernels.can_transpose(inside, source)
    kernels.transpose(inside, source)
    np.testing.assert_array_equal(inside, source.T)
    assert not out[:, :4].any() and not out[:, -4:].any()


@pytest.mark.parametrize("shape, dtype", [((7, 8), np.uint16), ((8, 12), np.uint16), ((8, 16), np.uint8)])
def test_transpose_is_only_for_whole_squares(shape, dtype):
    assert not kernels.can_transpose(np.zeros(shape[::-1], dtype), np.zeros(shape, dtype))


def test_transpose_is_only_for_elements_of_one_or_two_bytes():
    assert kernels.can_transpose(np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8))
    assert not kernels.can_transpose(np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32))
    assert not kernels.can_transpose(np.zeros((16, 16), np.uint16), np.zeros((16, 16), np.uint8))
