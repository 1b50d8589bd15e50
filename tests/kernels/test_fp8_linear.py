"""FP8 products against FP32 products of the dequantised numbers. Tolerance: 2^-8 relative norm for a BF16 result
(one rounding), 1e-6 for FP32 partial results."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import fp8_linear as kernel
from deepspan.backends.torch_triton.kernels import quant
from deepspan.models.errors import DeepspanError


def weights(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes inside a larger NaN matrix (e4m3's NaN reads as 480 in the interpreter) and scales inside NaN scales."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    wide = torch.full((outputs + 3, -(-inputs // 16) * 16 + 32), torch.nan).to(torch.float8_e4m3fn)
    wide[:outputs, :inputs] = (torch.randn(outputs, inputs, generator=generator) * 64).to(torch.float8_e4m3fn)
    grid = -(-outputs // 128), -(-inputs // 128)
    scales = torch.full((grid[0] + 2, grid[1] + 3), torch.nan)
    scales[: grid[0], : grid[1]] = torch.rand(grid, generator=generator) + 0.5
    return wide[:outputs, :inputs], scales[: grid[0], : grid[1]]


def rows(count: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    wide = torch.full((count + 2, inputs + 16), torch.nan).bfloat16()
    wide[:count, :inputs] = torch.randn(count, inputs, generator=generator)
    return wide[:count, :inputs]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("count", [1, 2, 17, 64])
@pytest.mark.parametrize("outputs, inputs", [(128, 256), (200, 1408), (37, 144), (5, 36)])
def test_equals_the_dequantised_product(count, outputs, inputs, quantised):
    weight, scales = weights(outputs, inputs)
    x = quant.quantise(rows(count, inputs)) if quantised else rows(count, inputs)
    got = kernel.fp8_linear(x, weight, scales)
    assert got.dtype == torch.bfloat16
    assert distance(got, kernel.fp8_linear_eager(x, weight, scales)) < 2**-8


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_partial_results_add_up(count, splits):
    weight, scales = weights(136, 1300)
    x = quant.quantise(rows(count, 1300))
    got = kernel.fp8_linear(x, weight, scales, splits=splits)
    assert got.shape == (count, splits, 136)
    assert distance(got.sum(1), kernel.fp8_linear_eager(x, weight, scales)) < 1e-6


@pytest.mark.parametrize("count", [1, 5])
def test_gated_product(count):
    weight, scales = weights(512, 384)
    scales /= 4096
    x = quant.quantise(rows(count, 384))
    got = kernel.fp8_linear(x, weight, scales, gated=True)
    assert got.shape == (count, 256)
    assert distance(got, kernel.fp8_linear_eager(x, weight, scales, gated=True)) < 2**-8


@pytest.mark.parametrize("block_n, warps", [(16, 1), (4, 4)])
def test_the_vector_kernel_in_other_configurations(block_n, warps):
    weight, scales = weights(40, 640)
    x = quant.quantise(rows(1, 640))
    got = kernel.fp8_linear(x, weight, scales, config=kernel.Config(1, block_n, warps))
    assert distance(got, kernel.fp8_linear_eager(x, weight, scales)) < 2**-8


def test_what_it_cannot_take_is_one_clear_error():
    weight, scales = weights(128, 256)
    with pytest.raises(DeepspanError, match="activations .* for weights .*: kernel fp8_linear"):
        kernel.fp8_linear(rows(2, 128), weight, scales)
    with pytest.raises(DeepspanError, match="scales .* for blocks"):
        kernel.fp8_linear(rows(2, 256), weight, scales[:, :1])
