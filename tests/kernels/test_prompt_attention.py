"""Attention of prompts against FP32 softmax. Tolerance: relative norm 2^-7 (weights and results are rounded to BF16).

Positions that no query of a tile may see, and everything around the inputs, are NaN.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import prompt_attention as kernel
from tests.kernels.test_mla_decode import distance
from tests.kernels.test_rope_cache import frame


@pytest.mark.parametrize("heads, nope, rope, value", [(2, 128, 64, 128), (3, 16, 8, 24)])
def test_equals_softmax_attention(heads, nope, rope, value):
    """A prompt with cached positions before it, a whole one in two tiles, and one whose last tile has one query."""
    tiles, queries, positions = [], 0, 0
    for context, count in ((70, 9), (0, 130), (5, 129)):
        for first in range(0, count, kernel.TILE_QUERIES):
            size = min(kernel.TILE_QUERIES, count - first)
            tiles.append(kernel.Tile(queries + first, size, positions, context + first))
        queries, positions = queries + count, positions + context + count
    q, kv = frame(queries, heads, nope + rope), frame(positions, heads, nope + value, seed=1)
    rotated, tiles_U = frame(positions, rope, seed=2), torch.tensor(tiles, dtype=torch.int32)
    results = []
    for attend in (kernel.prompt_attention, kernel.prompt_attention_eager):
        out = torch.full((queries, heads, value), torch.nan).bfloat16()
        attend(q, kv, rotated, tiles_U, out, 0.2)
        results.append(out)
    assert distance(*results) < 2**-7


def test_queries_in_no_tile_are_left_alone_and_later_positions_unseen():
    q, kv, rotated = frame(8, 2, 24), frame(40, 2, 32, seed=1), frame(40, 8, seed=2)
    kv[13:], rotated[13:] = torch.nan, torch.nan
    out = torch.full((8, 2, 16), 7.0).bfloat16()
    kernel.prompt_attention(q, kv, rotated, torch.tensor([[2, 3, 0, 10]], dtype=torch.int32), out, 1.0)
    want = torch.full_like(out, 7.0)
    kernel.prompt_attention_eager(q, kv, rotated, torch.tensor([[2, 3, 0, 10]], dtype=torch.int32), want, 1.0)
    assert distance(out, want) < 2**-7
    assert (out[[0, 1, 5, 6, 7]] == 7).all()
