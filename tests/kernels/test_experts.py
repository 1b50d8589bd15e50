"""Grouped experts against dequantised products. Tolerance: 2^-8 relative norm for BF16 results, 1e-6 for FP32 ones.

Experts that nobody chose are NaN, codes and scales, so that touching one shows.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import experts as kernel
from deepspan.backends.torch_triton.kernels import quant
from deepspan.models.errors import DeepspanError

HIDDEN, WIDTH, EXPERTS = 320, 128, 7


def matrices(count: int, outputs: int, inputs: int, used: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    codes = torch.full((count, outputs, inputs + 16), torch.nan).to(torch.float8_e4m3fn)
    scales = torch.full((count, -(-outputs // 128), -(-inputs // 128) + 1), torch.nan)
    for e in used:
        values = torch.randn(outputs, inputs, generator=generator) * 64
        codes[e, :, :inputs] = values.to(torch.float8_e4m3fn)
        scales[e, :, :-1] = (torch.rand(scales[e, :, :-1].shape, generator=generator) + 0.5) / 1024
    return codes[:, :, :inputs], scales[:, :, :-1]


def stack(ids: torch.Tensor) -> kernel.Stack:
    used = set(ids.flatten().tolist()) & set(range(EXPERTS))
    return kernel.Stack(*matrices(EXPERTS, 2 * WIDTH, HIDDEN, used), *matrices(EXPERTS, HIDDEN, WIDTH, used))


def choices(tokens: int, per_token: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts of 0 … 4 for each token, then 6, the shared one; 5 is never chosen."""
    generator = torch.Generator().manual_seed(seed)
    routed = torch.stack([torch.randperm(5, generator=generator)[: per_token - 1] for _ in range(tokens)])
    return torch.cat([routed, torch.full((tokens, 1), 6)], 1).int()


def tiles_of(ids: torch.Tensor) -> kernel.Tiles:
    return kernel.group(ids, EXPERTS) if len(ids) > 1 else kernel.one_pair_tiles(ids)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("tokens, per_token", [(1, 4), (2, 3), (19, 4)])
def test_experts_equal_dequantised_products(tokens, per_token, quantised):
    ids = choices(tokens, per_token)
    weights = torch.rand(ids.shape)
    weights[:, -1] = 1
    layer = stack(ids)
    x = torch.randn(tokens, HIDDEN).bfloat16()
    x = quant.quantise(x) if quantised else x
    tiles = tiles_of(ids)
    h = kernel.gate_up(x, ids, layer, tiles)
    assert distance(h, kernel.gate_up_eager(x, ids, layer)) < 2**-8
    h = quant.quantise(h) if quantised else h
    got = kernel.down(h, ids, weights, layer, tiles)
    assert got.dtype == torch.float32
    assert distance(got.sum(1), kernel.down_eager(h, ids, weights, layer).sum(1)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_choices_of_other_ranks_add_nothing(tokens):
    ids = choices(tokens, 4)
    ids[0, 0], ids[-1, 2] = -1, EXPERTS
    layer, weights = stack(ids), torch.rand(ids.shape)
    tiles = tiles_of(ids)
    h = kernel.gate_up(torch.randn(tokens, HIDDEN).bfloat16(), ids, layer, tiles)
    here = (ids >= 0) & (ids < EXPERTS)
    h = torch.where(here.view(-1, 1), h, torch.nan)
    got = kernel.down(h, ids, weights, layer, tiles, foreign=True)
    want = kernel.down_eager(torch.where(here.view(-1, 1), h, 0), ids, weights, layer)
    assert distance(got.sum(1), want.sum(1)) < 1e-6


@pytest.mark.parametrize("tokens, per_token", [(2, 2), (40, 4)])
def test_tiles_hold_every_pair_once(tokens, per_token):
    ids = choices(tokens, per_token, seed=1)
    tiles = kernel.group(ids, EXPERTS)
    seen = []
    for expert, rows, pairs in zip(*(part.tolist() for part in tiles), strict=True):
        if expert < 0:
            continue
        assert 1 <= rows <= 16
        assert all(ids.flatten()[pair] == expert for pair in pairs[:rows])
        seen += pairs[:rows]
    assert sorted(seen) == list(range(ids.numel()))
    used = [expert for expert in tiles.expert_U.tolist() if expert >= 0]
    assert used == sorted(used)


def test_tiles_of_another_size_are_refused():
    ids = choices(2, 3)
    tiles = kernel.group(ids, EXPERTS, kernel.Config(32, 32, 2, 64, 2))
    with pytest.raises(DeepspanError, match="tiles of 32 pairs: kernel gate_up"):
        kernel.gate_up(torch.randn(2, HIDDEN).bfloat16(), ids, stack(ids), tiles)
