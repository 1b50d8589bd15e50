"""Grouped experts against dequantised products. Tolerance: 2^-8 relative norm for BF16 results, 1e-6 for FP32 ones
(2^-11 on GPUs: the FP8 units of Hopper add with 14 bits).

Experts that nobody chose are NaN, codes and scales, so that touching one shows.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import experts as kernel
from deepspan.backends.torch_triton.kernels.chips import chip_named, chip_of
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight
from deepspan.models.errors import DeepspanError
from tests.kernels.device import DEVICE, seeded
from tests.kernels.quantised import KINDS, distance, operand, weights

HIDDEN, WIDTH, EXPERTS = 320, 128, 7
TOLERANCE = 1e-6 if DEVICE.type == "cpu" else 2**-11


def used(ids: torch.Tensor, experts: int = EXPERTS) -> set[int]:
    return set(ids.flatten().tolist()) & set(range(experts))


def stack(ids: torch.Tensor, kind: str = "fp8") -> kernel.Stack:
    shapes = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    return kernel.Stack(*(weights(kind, *shape, EXPERTS, used(ids)) for shape in shapes))


def choices(tokens: int, per_token: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts of 0 … 4 for each token, then 6, the shared one; 5 is never chosen."""
    generator = seeded(seed)
    routed = torch.stack([torch.randperm(5, generator=generator)[: per_token - 1] for _ in range(tokens)])
    return torch.cat([routed, torch.full((tokens, 1), 6)], 1).int()


def tiles_of(ids: torch.Tensor, layer: kernel.Stack, config: kernel.Config | None = None) -> kernel.Tiles:
    config = config or kernel.choose(ids, layer, chip_of(ids.device))
    return kernel.group(ids, EXPERTS, config)


@pytest.mark.parametrize(
    "tokens, per_token, kind, quantised",
    [(*shape, "fp8", quantised) for shape in ((1, 4), (2, 3), (19, 4)) for quantised in (True, False)]
    + [(*shape, kind, True) for shape in ((1, 4), (5, 3)) for kind in KINDS[1:]],
)
def test_experts_equal_dequantised_products(tokens, per_token, kind, quantised):
    ids = choices(tokens, per_token)
    factors = torch.rand(ids.shape)
    factors[:, -1] = 1
    layer = stack(ids, kind)
    x = torch.randn(tokens, HIDDEN).bfloat16()
    x = operand(kind, x) if quantised else x
    tiles = tiles_of(ids, layer)
    h = kernel.gate_up(x, ids, layer, tiles)
    assert distance(h, kernel.gate_up_eager(x, ids, layer)) < 2**-8
    h = operand(kind, h) if quantised else h
    got = kernel.down(h, ids, factors, layer, tiles)
    assert got.dtype == torch.float32 and got.shape == (tokens, 1 if tokens == 1 else per_token, HIDDEN)
    assert torch.equal(kernel.down(h, ids, factors, layer, tiles), got)  # counters are as they were
    assert distance(got.sum(1), kernel.down_eager(h, ids, factors, layer).sum(1)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_are_not_full(kind):
    ids = choices(1, 4)
    factors, layer = torch.rand(ids.shape), stack(ids, kind)
    config = kernel.Config(16, 27, 2, 47, 2)
    tiles = tiles_of(ids, layer, config)
    x = operand(kind, torch.randn(1, HIDDEN).bfloat16())
    h = kernel.gate_up(x, ids, layer, tiles, config)
    assert distance(h, kernel.gate_up_eager(x, ids, layer)) < 2**-8
    h = operand(kind, h)
    got = kernel.down(h, ids, factors, layer, tiles, config=config)
    assert distance(got.sum(1), kernel.down_eager(h, ids, factors, layer).sum(1)) < TOLERANCE


def test_one_token_on_a_large_chip_gives_each_processor_as_many_tiles():
    ids = torch.arange(9, dtype=torch.int32)[None]
    sizes = (257, 4096, 7168), (257, 7168, 2048)
    layer = kernel.Stack(*(Fp8Weight(torch.empty(size, device="meta"), torch.empty(0)) for size in sizes))
    assert kernel.choose(ids, layer, chip_named("sm_90"))[1:5] == (47, 4, 124, 3)


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated is NaN at first."""
    empty = torch.empty

    def nan(*sizes, **kinds) -> torch.Tensor:
        room = empty(*sizes, **kinds)
        return room.fill_(torch.nan) if room.is_floating_point() else room

    monkeypatch.setattr(torch, "empty", nan)


@pytest.mark.parametrize("tokens", [1, 5])
def test_choices_of_other_ranks_add_nothing(tokens, poisoned):
    ids = choices(tokens, 4)
    ids[0, 0], ids[-1, 2] = -1, EXPERTS
    layer, factors = stack(ids), torch.rand(ids.shape)
    tiles = tiles_of(ids, layer)
    h = kernel.gate_up(torch.randn(tokens, HIDDEN).bfloat16(), ids, layer, tiles)
    here = (ids >= 0) & (ids < EXPERTS)
    h = torch.where(here.view(-1, 1), h, torch.nan)
    got = kernel.down(h, ids, factors, layer, tiles, foreign=True)
    want = kernel.down_eager(torch.where(here.view(-1, 1), h, 0), ids, factors, layer)
    if tokens > 1:
        assert torch.isnan(got[0, 0]).all(), "parts of other ranks are not written"
        got = torch.where(here[:, :, None], got, 0)
    assert distance(got.sum(1), want.sum(1)) < TOLERANCE


@pytest.mark.parametrize("own", [0, 1, 4])
def test_what_is_beside_one_tokens_experts_is_added(own, poisoned):
    ids = choices(1, 4)
    ids[:, own:] = EXPERTS
    layer, factors = stack(ids), torch.rand(ids.shape)
    tiles = tiles_of(ids, layer)
    h = kernel.gate_up(torch.randn(1, HIDDEN).bfloat16(), ids, layer, tiles)
    beside = torch.randn(1, 2 * HIDDEN).bfloat16()[:, :HIDDEN]
    got = [kernel.down(h, ids, factors, layer, tiles, True, beside_TD=beside) for _ in range(2)]
    assert torch.equal(*got), "counters are as they were"
    want = kernel.down_eager(torch.where(ids.view(-1, 1) < EXPERTS, h, 0), ids, factors, layer).sum(1) + beside
    assert distance(got[0].sum(1), want) < TOLERANCE


def test_of_several_tokens_nothing_is_beside():
    ids = choices(2, 3)
    layer = stack(ids)
    h = torch.zeros(ids.numel(), layer.down.codes.shape[-1]).bfloat16()
    with pytest.raises(DeepspanError, match=r"\(2, 320\) beside 2 tokens: kernel down"):
        kernel.down(h, ids, torch.rand(ids.shape), layer, tiles_of(ids, layer), beside_TD=torch.zeros(2, HIDDEN))


def test_a_rank_with_some_of_the_experts_has_tiles_for_twice_its_share():
    ids = torch.arange(8, dtype=torch.int32)[None]
    sizes = (65, 4096, 7168), (65, 7168, 2048)
    layer = kernel.Stack(*(Fp8Weight(torch.empty(size, device="meta"), torch.empty(0)) for size in sizes))
    chip = chip_named("sm_90")
    assert kernel.choose(ids, layer, chip, 1 / 4) == kernel.choose(ids[:, :4], layer, chip)


@pytest.mark.parametrize("tokens, per_token", [(2, 2), (40, 4)])
def test_tiles_hold_every_pair_once(tokens, per_token):
    ids = choices(tokens, per_token, seed=1)
    tiles = kernel.group(ids, EXPERTS, kernel.Config(16, 32, 2, 64, 2))
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
