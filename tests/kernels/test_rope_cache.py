"""RoPE, latent norm and cache write against their twin. Tolerance: 1 BF16 ulp (sums and products in another order).
In FP8, a latent on the border between two codes may get the other one.

Untouched cache slots and everything around the inputs are NaN.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import rope_cache as kernel
from deepspan.models.rope import rope_tables
from tests.kernels.caches import DTYPES, assert_same_entries, poisoned
from tests.kernels.device import seeded
from tests.specs import make


def frame(*shape: int, dtype=torch.bfloat16, seed: int = 0, left: int = 3, right: int = 8) -> torch.Tensor:
    """Random numbers as a view inside NaN."""
    wide = torch.full([size + 2 for size in shape[:-1]] + [left + shape[-1] + right], torch.nan, dtype=dtype)
    inside = [slice(1, size + 1) for size in shape[:-1]]
    view = wide[(*inside, slice(left, shape[-1] + left))]
    view[:] = torch.randn(shape, generator=seeded(seed))
    return view


@pytest.mark.parametrize("latent, rope, heads", [(512, 64, 4), (20, 6, 3), (196, 16, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("page", [64, 5])
def test_equals_its_twin(latent, rope, heads, dtype, held, page):
    tokens = 4
    kv = frame(tokens, latent + rope, dtype=dtype)
    q = frame(tokens, heads, rope, seed=1, left=2)
    weight = torch.rand(latent) + 0.5
    positions = torch.tensor([0, 255, 7, 8], dtype=torch.int32)
    slots = torch.tensor([3 * page, page - 1, -1, 2 * page + 3], dtype=torch.int64)
    tables = kernel.Tables(*map(torch.tensor, rope_tables(make(qk_rope_head_dim=rope), 256)))
    results = []
    for write in (kernel.rope_cache, kernel.rope_cache_eager):
        cache = poisoned(4, page, latent, rope, held)
        out = torch.full((tokens, heads, latent + rope), torch.nan).bfloat16()
        write(kv, weight, 1e-6, q, out[:, :, latent:], positions, slots, tables, cache)
        results.append((cache, out))
    (cache, out), (cache_twin, out_twin) = results
    assert_same_entries(cache, cache_twin, latent, count=3)
    torch.testing.assert_close(out, out_twin, rtol=2**-7, atol=1e-6, equal_nan=True)


def test_queries_may_be_rotated_in_place():
    q, kv = frame(1, 4, 16, left=2), frame(1, 48)
    tables = kernel.Tables(*map(torch.tensor, rope_tables(make(qk_rope_head_dim=16), 9)))
    at = torch.tensor([8]), torch.tensor([0])
    expected, cache = torch.empty(1, 4, 16).bfloat16(), torch.empty(1, 4, 48).bfloat16()
    kernel.rope_cache_eager(kv, torch.ones(32), 1e-6, q, expected, *at, tables, cache)
    kernel.rope_cache(kv, torch.ones(32), 1e-6, q, q, *at, tables, cache)
    torch.testing.assert_close(q, expected, rtol=2**-7, atol=1e-6)
