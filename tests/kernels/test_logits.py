"""Logits of few rows against an FP32 product, NaN around both matrices. Tolerance: sums in another order."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import logits as kernel
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded
from tests.kernels.rows import poisoned


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("vocabulary, channels", [(600, 256), (88, 72), (131, 128)])
@pytest.mark.parametrize("config", [None, kernel.Config(47, 64, 3)])
def test_logits_are_those_of_an_fp32_product(rows, vocabulary, channels, config):
    generator = seeded(rows)
    x = torch.randn(rows, channels, generator=generator).bfloat16()
    table = torch.randn(vocabulary, channels, generator=generator).bfloat16()
    got = kernel.logits(poisoned(x), poisoned(table), config)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ table.float().t(), rtol=1e-4, atol=1e-4)


def test_a_row_has_the_same_bits_in_any_batch():
    x, table = torch.randn(5, 256).bfloat16(), torch.randn(300, 256).bfloat16()
    together = kernel.logits(x, table)
    assert all(torch.equal(kernel.logits(x[i : i + 1], table)[0], together[i]) for i in range(5))


def test_what_it_cannot_take_is_one_clear_error():
    table = torch.zeros(40, 32).bfloat16()
    with pytest.raises(DeepspanError, match=r"\(65, 32\) by \(40, 32\): kernel logits"):
        kernel.logits(torch.zeros(65, 32).bfloat16(), table)
    with pytest.raises(DeepspanError, match="torch.float32 by torch.bfloat16: kernel logits"):
        kernel.logits(torch.zeros(5, 32), table)
