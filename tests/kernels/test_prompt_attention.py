"""Attention of prompts against FP32 softmax. Tolerance: relative norm 2^-7 (weights and results are rounded to BF16).

Positions that no query of a tile may see, and everything around the inputs, are NaN.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import prompt_attention as kernel
from deepspan.backends.torch_triton.kernels.chips import chip_named, chip_of
from tests.kernels.device import DEVICE, seeded
from tests.kernels.test_mla_decode import distance
from tests.kernels.test_rope_cache import frame


def tiles_of(prompts):
    """Tiles of prompts with as many cached positions and queries, and how many queries and positions there are."""
    tiles, queries, positions = [], 0, 0
    for context, count in prompts:
        for first in range(0, count, kernel.TILE_QUERIES):
            size = min(kernel.TILE_QUERIES, count - first)
            tiles.append(kernel.Tile(queries + first, size, positions, context + first))
        queries, positions = queries + count, positions + context + count
    return tiles, queries, positions


@pytest.mark.parametrize("heads, nope, rope, value", [(2, 128, 64, 128), (3, 16, 8, 24)])
def test_equals_softmax_attention(heads, nope, rope, value):
    """A prompt with cached positions before it, a whole one in two tiles, and one whose last tile has one query."""
    tiles, queries, positions = tiles_of([(70, 9), (0, 130), (5, 129)])
    q, kv = frame(queries, heads, nope + rope), frame(positions, heads, nope + value, seed=1)
    rotated, tiles_U = frame(positions, rope, seed=2), torch.tensor(tiles, dtype=torch.int32)
    results = []
    for attend in (kernel.prompt_attention, kernel.prompt_attention_eager):
        out = torch.full((queries, heads, value), torch.nan).bfloat16()
        attend(q, kv, rotated, tiles_U, out, 0.2)
        results.append(out)
    assert distance(*results) < 2**-7


def test_hopper_has_a_kernel_for_much_work_of_deepseeks_sizes():
    hopper = chip_named("sm_90")
    q, kv, rotated = torch.empty(9, 128, 192), torch.empty(9, 128, 256), torch.empty(9, 576)[:, 512:]
    q, kv, rotated = (x.bfloat16() for x in (q, kv, rotated))
    assert kernel.choose(q, kv, rotated, 16, hopper) == kernel.HOPPER
    others = [
        (q, kv, rotated, 15, hopper),
        (q, kv, rotated, 16, chip_named("sm_100")),
        (q, kv, rotated[:, :32], 16, hopper),
    ]
    others += [(q[:, ::2], kv, rotated, 32, hopper), (q, kv[:, :, :200], rotated, 16, hopper)]
    assert all(kernel.choose(*other) != kernel.HOPPER for other in others)


@pytest.mark.skipif(chip_of(DEVICE).name != "sm_90", reason="Gluon has no interpreter: needs a Hopper GPU")
@pytest.mark.parametrize("heads", [1, 2, 16, 128])
def test_hopper_equals_softmax_attention(heads):
    """Tiles of 1 to 128 queries, keys that end within a tile, more and fewer tiles than programs; NaN beyond."""
    tiles, queries, positions = tiles_of([(70, 9), (0, 130), (5, 129), (300, 1), (0, 64), (127, 65), (1, 400)])
    q, kv, rotated = (torch.full((size + 200, *rest), torch.nan).bfloat16() for size, rest in (
        (queries, (heads, 192)), (positions, (heads, 256)), (positions, (64,))))  # fmt: skip
    for x, size in (q, queries), (kv, positions), (rotated, positions):
        x[:size] = torch.randn(size, *x.shape[1:], generator=seeded(x.dim()))
    tiles_U = torch.tensor(sorted(tiles, key=lambda tile: -tile.queries - tile.position), dtype=torch.int32)
    got, want = (torch.full((queries + 200, heads, 128), 7.0).bfloat16() for _ in range(2))
    kernel.prompt_attention(q, kv, rotated, tiles_U, got, 0.1, kernel.HOPPER)
    kernel.prompt_attention_eager(q, kv, rotated, tiles_U, want, 0.1)
    assert distance(got[:queries], want[:queries]) < 2**-7
    assert (got[queries:] == 7).all()


def test_queries_in_no_tile_are_left_alone_and_later_positions_unseen():
    q, kv, rotated = frame(8, 2, 24), frame(40, 2, 32, seed=1), frame(40, 8, seed=2)
    kv[13:], rotated[13:] = torch.nan, torch.nan
    out = torch.full((8, 2, 16), 7.0).bfloat16()
    kernel.prompt_attention(q, kv, rotated, torch.tensor([[2, 3, 0, 10]], dtype=torch.int32), out, 1.0)
    want = torch.full_like(out, 7.0)
    kernel.prompt_attention_eager(q, kv, rotated, torch.tensor([[2, 3, 0, 10]], dtype=torch.int32), want, 1.0)
    assert distance(out, want) < 2**-7
    assert (out[[0, 1, 5, 6, 7]] == 7).all()
