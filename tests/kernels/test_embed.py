"""Rows of a table against the twin, bit for bit; what is around the table, and rows of outputs not asked for, is NaN
or out of range."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.embed import embed, embed_eager
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded

FAR = 2**31 - 1


@pytest.mark.parametrize("first", [0, 20])
@pytest.mark.parametrize("hidden", [36, 1100])
def test_equals_its_twin(first, hidden):
    wide = torch.full((33, hidden + 5), torch.nan).bfloat16()
    table = wide[1:31, 2 : 2 + hidden]
    table[:] = torch.randn(30, hidden, generator=seeded(hidden))
    last = torch.tensor([19, 4, FAR, 49, 50], dtype=torch.int32)
    ids = torch.tensor([0, -1, 29, -2, 20, -4, 30, -5, 49], dtype=torch.int32)
    got = embed(ids, last, table, first)
    assert got.is_contiguous()
    assert torch.equal(got, embed_eager(ids, last, table, first))
    assert torch.equal(got[1].isfinite(), torch.ones(hidden, dtype=torch.bool))
    assert got[1].any() == (first == 0)


def test_what_it_cannot_take_is_one_clear_error():
    ids, table = torch.zeros(2, dtype=torch.int32), torch.zeros(4, 8).bfloat16()
    with pytest.raises(DeepspanError, match="token ids in torch.int64: kernel embed"):
        embed(ids.long(), ids, table)
    with pytest.raises(DeepspanError, match="rows must be contiguous"):
        embed(ids, ids, torch.zeros(8, 4).bfloat16().t())
