"""FP8 products against FP32 products of the dequantised numbers. Tolerance: 2^-8 relative norm, for one
rounding to BF16; the same launch twice gives the same bits."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import fp8_linear as kernel
from deepspan.backends.torch_triton.kernels import quant
from deepspan.backends.torch_triton.kernels.chips import counters
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


@pytest.mark.parametrize("count", [1, 18])
@pytest.mark.parametrize("splits", [2, 5])
def test_splits(count, splits):
    """Two launches: the counters are zero again after each."""
    weight, scales = weights(136, 1300)
    x = quant.quantise(rows(count, 1300))
    config = kernel.Config(16, 64, splits, 4, 2)
    got = kernel.fp8_linear(x, weight, scales, config=config)
    assert distance(got, kernel.fp8_linear_eager(x, weight, scales)) < 2**-8
    assert torch.equal(kernel.fp8_linear(x, weight, scales, config=config), got)
    assert not counters(x.codes.device).any()


@pytest.mark.parametrize("count", [1, 5])
def test_gated_product(count):
    weight, scales = weights(512, 384)
    scales /= 4096
    x = quant.quantise(rows(count, 384))
    got = kernel.fp8_linear(x, weight, scales, gated=True)
    assert got.shape == (count, 256)
    assert distance(got, kernel.fp8_linear_eager(x, weight, scales, gated=True)) < 2**-8


def test_what_it_cannot_take_is_one_clear_error():
    weight, scales = weights(128, 256)
    with pytest.raises(DeepspanError, match="activations .* for weights .*: kernel fp8_linear"):
        kernel.fp8_linear(rows(2, 128), weight, scales)
    with pytest.raises(DeepspanError, match="scales .* for blocks"):
        kernel.fp8_linear(rows(2, 256), weight, scales[:, :1])
