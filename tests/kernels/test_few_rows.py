"""Few rows times quantised weights against FP32 products of the dequantised numbers. Tolerance: 2^-8 relative norm, for
one rounding to BF16; the same launch twice gives the same bits."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import few_rows as kernel
from deepspan.backends.torch_triton.kernels import quant
from deepspan.backends.torch_triton.kernels.chips import counters
from deepspan.models.errors import DeepspanError
from tests.kernels.quantised import KINDS, distance, operand, rows, weights


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("count", [1, 2, 17, 64])
@pytest.mark.parametrize("outputs, inputs", [(128, 256), (200, 1408), (37, 144), (5, 36)])
def test_equals_the_dequantised_product(count, outputs, inputs, quantised):
    weight = weights("fp8", outputs, inputs)
    x = quant.quantise(rows(count, inputs)) if quantised else rows(count, inputs)
    got = kernel.few_rows(x, weight)
    assert got.dtype == torch.bfloat16
    assert distance(got, kernel.few_rows_eager(x, weight)) < 2**-8


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("count, outputs, inputs", [(1, 200, 512), (17, 37, 168), (2, 5, 40)])
def test_other_formats_equal_it_too(kind, count, outputs, inputs):
    weight, x = weights(kind, outputs, inputs), operand(kind, rows(count, inputs))
    assert distance(kernel.few_rows(x, weight), kernel.few_rows_eager(x, weight)) < 2**-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count, splits", [(1, 5), (18, 2)])
def test_splits(kind, count, splits):
    """Two launches: the counters are zero again after each."""
    weight, x = weights(kind, 136, 1300), operand(kind, rows(count, 1300))
    config = kernel.Config(16, 64, splits, 4, 2)
    got = kernel.few_rows(x, weight, config=config)
    assert distance(got, kernel.few_rows_eager(x, weight)) < 2**-8
    assert torch.equal(kernel.few_rows(x, weight, config=config), got)
    assert not counters(got.device).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 2])
def test_tiles_that_are_not_full(kind, splits):
    weight, x = weights(kind, 136, 640), operand(kind, rows(3, 640))
    got = kernel.few_rows(x, weight, config=kernel.Config(16, 45, splits, 4, 2))
    assert distance(got, kernel.few_rows_eager(x, weight)) < 2**-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count, tile", [(1, None), (5, None), (1, 27)])
def test_gated_product(kind, count, tile):
    weight, x = weights(kind, 512, 384), operand(kind, rows(count, 384))
    got = kernel.few_rows(x, weight, gated=True, config=tile and kernel.Config(16, tile, 1, 4, 2))
    assert got.shape == (count, 256)
    assert distance(got, kernel.few_rows_eager(x, weight, gated=True)) < 2**-8


def test_what_it_cannot_take_is_one_clear_error():
    weight = weights("fp8", 128, 256)
    with pytest.raises(DeepspanError, match="activations .* for weights .*: kernel few_rows"):
        kernel.few_rows(rows(2, 128), weight)
    with pytest.raises(DeepspanError, match="scales .* for "):
        kernel.few_rows(rows(2, 256), weight._replace(scales=weight.scales[:, :1]))
    with pytest.raises(DeepspanError, match="takes no torch.bfloat16 activations for weights in torch.int8"):
        kernel.few_rows(rows(2, 256), weights("int8", 128, 256))
    with pytest.raises(DeepspanError, match="takes no torch.int8 activations for weights in torch.int16"):
        kernel.few_rows(operand("int8", rows(2, 256)), weights("int4", 128, 256))
