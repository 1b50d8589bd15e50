"""Sums of parts against their twin: the same to one BF16 ulp, for FP32 sums may be taken in another order there."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import combine as kernel
from deepspan.backends.torch_triton.kernels.pairs import sort_pairs
from deepspan.models.errors import DeepspanError
from tests.kernels.test_rope_cache import frame


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, parts, hidden", [(1, 1, 1100), (3, 9, 52)])
def test_equals_its_twin(tokens, parts, hidden, dtype):
    branch = frame(tokens, parts, hidden, dtype=dtype)
    got = kernel.add_parts(branch)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    torch.testing.assert_close(got, kernel.add_parts_eager(branch), rtol=2**-7, atol=1e-6)


def test_what_is_beside_the_parts_is_added():
    branch, beside = frame(5, 3, 52), torch.randn(5, 60).bfloat16()[:, :52]
    got = kernel.add_parts(branch, beside_TD=beside)
    torch.testing.assert_close(got, kernel.add_parts_eager(branch, beside_TD=beside), rtol=2**-7, atol=1e-6)
    assert not torch.equal(got, kernel.add_parts(branch))
    place, weights = torch.randperm(15).int(), torch.rand(5, 3)
    arguments = torch.randn(15, 52).bfloat16(), place, weights
    got = kernel.add_sorted(*arguments, beside_TD=beside)
    torch.testing.assert_close(got, kernel.add_sorted_eager(*arguments, beside_TD=beside))
    with pytest.raises(DeepspanError, match=r"\(4, 52\) beside: kernel add_parts"):
        kernel.add_parts(branch, beside_TD=beside[:4])


def test_parts_of_experts_that_are_not_here_are_not_read():
    branch = frame(40, 5, 52, dtype=torch.bfloat16)
    ids = torch.randint(-1, 6, (40, 5)).int()
    ids[3] = 4
    branch[(ids < 0) | (ids >= 4)] = torch.nan
    got = kernel.add_parts(branch, ids, 4)
    assert not got.isnan().any() and not got[3].any()
    torch.testing.assert_close(got, kernel.add_parts_eager(branch, ids, 4), rtol=2**-7, atol=1e-6)
    with pytest.raises(DeepspanError, match=r"choices \(40, 4\) in torch.int32: kernel add_parts"):
        kernel.add_parts(branch, ids[:, :4], 4)


def test_rows_of_sorted_pairs():
    ids = torch.randint(-1, 6, (40, 5)).int()
    ids[3] = 4
    pairs = sort_pairs(ids, 4, 16, foreign=True)
    y = torch.randn(200, 52).bfloat16()
    weights = torch.rand(40, 5)
    for limits in ((), (ids, 4)):
        got = kernel.add_sorted(y, pairs.place_R, weights, *limits)
        torch.testing.assert_close(got, kernel.add_sorted_eager(y, pairs.place_R, weights, *limits))
        y[int(pairs.own_1) :] = torch.nan
    assert not got[3].any()
    with pytest.raises(DeepspanError, match=r"200 rows for weights \(39, 5\) in torch.float32: kernel add_sorted"):
        kernel.add_sorted(y, pairs.place_R, weights[:39])
