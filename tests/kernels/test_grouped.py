"""Many tokens' experts against dequantised products. Tolerance: 2^-8 relative norm (results are BF16).

Experts that nobody chose are NaN, codes and scales, so that touching one shows.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import grouped as kernel
from deepspan.backends.torch_triton.kernels import quant
from tests.kernels.test_experts import EXPERTS, HIDDEN, WIDTH, choices, distance, matrices


def used(ids: torch.Tensor) -> set[int]:
    return set(ids.flatten().tolist()) & set(range(EXPERTS))


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("config", [None, kernel.Config(16, 64, 4, 2)])
def test_equals_dequantised_products(quantised, config):
    ids = choices(37, 4)
    pairs = kernel.sort_pairs(ids, EXPERTS, (config or kernel.choose(kernel.chip_of(ids.device))).block_m)
    weights = matrices(EXPERTS, 2 * WIDTH, HIDDEN, used(ids))
    x = torch.randn(37, HIDDEN).bfloat16()
    rows = kernel.gather(quant.quantise(x) if quantised else x, pairs, ids.shape[1])
    gate_up = kernel.grouped(rows, *weights, pairs, config=config)
    assert distance(gate_up, kernel.grouped_eager(rows, *weights, pairs, ids)) < 2**-8
    h = quant.quantise(gate_up, gated=True) if quantised else gate_up[:, :WIDTH]
    factors = torch.rand(ids.shape)
    weights = matrices(EXPERTS, HIDDEN, WIDTH, used(ids))
    got = kernel.grouped(h, *weights, pairs, factors, config=config)
    assert distance(got, kernel.grouped_eager(h, *weights, pairs, ids, factors)) < 2**-8


def test_choices_of_other_ranks_are_not_run():
    ids = choices(9, 3)
    ids[2, 0], ids[5, 1] = -1, EXPERTS
    config = kernel.Config(16, 64, 4, 2)
    pairs = kernel.sort_pairs(ids, EXPERTS, config.block_m)
    here = ((ids >= 0) & (ids < EXPERTS)).flatten()
    weights = matrices(EXPERTS, HIDDEN, WIDTH, used(ids))
    h = torch.randn(27, WIDTH).bfloat16()
    factors = torch.rand(ids.shape)
    got = kernel.grouped(h, *weights, pairs, factors, foreign=True, config=config)
    assert not got[~here].any()
    assert distance(got[here], kernel.grouped_eager(h, *weights, pairs, ids, factors)[here]) < 2**-8


@pytest.mark.parametrize("tokens, per_token, number, block_m", [(40, 4, 9, 16), (3, 2, 300, 128), (129, 8, 8, 32)])
def test_tiles_hold_every_pair_once(tokens, per_token, number, block_m):
    ids = torch.randint(number, (tokens, per_token), generator=torch.Generator().manual_seed(0)).int()
    ids[:, 0] = 5  # an expert with many tiles
    pairs = kernel.sort_pairs(ids, number, block_m)
    seen = []
    for expert, start, rows in zip(*(part.tolist() for part in pairs[1:]), strict=True):
        if expert < number:
            assert 0 < rows <= block_m
            here = pairs.pair_R[start : start + rows].tolist()
            assert all(ids.view(-1)[pair] == expert for pair in here)
            seen += here
    assert sorted(seen) == list(range(ids.numel()))
    assert len(pairs.expert_U) <= min(ids.numel(), number) + ids.numel() // block_m
