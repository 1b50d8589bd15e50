"""Pairs sorted by expert, and rows gathered for them."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import int8, quant
from deepspan.backends.torch_triton.kernels.pairs import gather, sort_pairs
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded


@pytest.mark.parametrize(
    "tokens, per_token, number, block_m", [(40, 4, 9, 16), (3, 2, 300, 128), (700, 3, 8, 32), (900, 2, 8, 192)]
)
def test_tiles_hold_every_pair_once(tokens, per_token, number, block_m):
    ids = torch.randint(number, (tokens, per_token), generator=seeded(0)).int()
    ids[:, 0] = 5  # an expert with many tiles
    pairs = sort_pairs(ids, number, block_m)
    seen = []
    for expert, start, rows in zip(*(part.tolist() for part in pairs.tiles[1:]), strict=True):
        if expert >= 0:
            assert 0 < rows <= block_m
            here = pairs.pair_R[start : start + rows].tolist()
            assert all(ids.view(-1)[pair] == expert for pair in here)
            seen += here
    assert sorted(seen) == list(range(ids.numel()))
    assert len(pairs.expert_U) <= min(ids.numel(), number) + ids.numel() // block_m


def test_tiles_of_an_expert_are_about_equally_tall():
    ids = torch.tensor([0] * 193 + [1] * 192 + [2] * 449 + [3] * 5, dtype=torch.int32)[:, None]
    pairs = sort_pairs(ids, 4, 192)
    rows = [(expert, rows) for expert, rows in zip(pairs.expert_U.tolist(), pairs.rows_U.tolist(), strict=True)]
    assert [tile for tile in rows if tile[0] >= 0] == [
        (0, 128), (0, 65), (1, 192), (2, 192), (2, 192), (2, 65), (3, 5)
    ]  # fmt: skip


def test_pairs_of_experts_that_are_not_here_come_last():
    ids = torch.tensor([[0, -1, 2], [3, 1, 2], [1, 7, 0]], dtype=torch.int32)
    pairs = sort_pairs(ids, 3, 16, foreign=True)
    assert pairs.own_1.tolist() == [6]
    assert pairs.ends_E.tolist() == [2, 4, 6]
    assert pairs.pair_R[pairs.place_R.long()].tolist() == list(range(9))
    assert sort_pairs(ids, 3, 16).own_1 is None
    assert [sorted(pairs.pair_R[a:b].tolist()) for a, b in ((0, 2), (2, 4), (4, 6), (6, 9))] == [
        [0, 8], [4, 6], [2, 5], [1, 3, 7]
    ]  # fmt: skip
    assert pairs.expert_U.tolist() == [0, 1, 2]
    assert pairs.start_U.tolist() == [0, 2, 4]
    assert pairs.rows_U.tolist() == [2, 2, 2]


@pytest.mark.parametrize("channels", [40, 2056])
def test_rows_are_gathered_with_their_scales(channels):
    wide = torch.full((21, channels + 8), torch.nan).bfloat16()
    x = wide[:, :channels]
    x[:] = torch.randn(21, channels, generator=seeded(0))
    ids = torch.randint(-1, 6, (21, 3), generator=seeded(1)).int()
    pairs = sort_pairs(ids, 5, 16)
    rows = pairs.pair_R.long() // 3
    assert torch.equal(gather(x, pairs, 3), x[rows])
    for codes in (quant.quantise(x), int8.quantise_rows(x)):
        got = gather(codes, pairs, 3)
        assert torch.equal(got.codes.view(torch.uint8), codes.codes.view(torch.uint8)[rows])
        assert torch.equal(got.scales, codes.scales[rows])
        assert got.scales.t().is_contiguous()


def test_rows_of_experts_that_are_not_here_are_not_gathered():
    x = torch.randn(30, 48, generator=seeded(0)).bfloat16()
    ids = torch.randint(-1, 6, (30, 3), generator=seeded(1)).int()
    ids[20:] = 9
    pairs = sort_pairs(ids, 5, 16, foreign=True)
    own = int(pairs.own_1)
    assert own == int(((ids >= 0) & (ids < 5)).sum())
    x[20:] = torch.nan
    rows = pairs.pair_R[:own].long() // 3
    assert torch.equal(gather(x, pairs, 3)[:own], x[rows])
    codes = quant.quantise(x.nan_to_num())
    got = gather(codes, pairs, 3)
    assert torch.equal(got.codes.view(torch.uint8)[:own], codes.codes.view(torch.uint8)[rows])
    assert torch.equal(got.scales[:own], codes.scales[rows])


def test_what_they_cannot_take_is_one_clear_error():
    ids = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(DeepspanError, match="choices in torch.int64: kernel sort_pairs"):
        sort_pairs(ids.long(), 3, 16)
    with pytest.raises(DeepspanError, match="rows of 12 bytes: kernel gather"):
        gather(torch.zeros(4, 6).bfloat16(), sort_pairs(ids, 3, 16), 2)
