"""Absorbed queries and cache entries against the twin. Tolerance: relative norm 2^-8 (results are BF16).

Untouched cache slots and everything around the inputs are NaN.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import absorb as kernel
from deepspan.backends.torch_triton.kernels import rope_cache
from deepspan.backends.torch_triton.kernels.kv_b import KvB
from deepspan.models.rope import rope_tables
from tests.kernels.caches import DTYPES, assert_same_entries, poisoned
from tests.kernels.device import seeded
from tests.kernels.quantised import weights
from tests.kernels.test_mla_decode import distance
from tests.kernels.test_rope_cache import frame
from tests.specs import make


def kv_b(kind: str, heads: int, rows: int, latent: int) -> KvB:
    """``rows`` of each head, inside NaN."""
    if kind == "fp8":
        return KvB(weights("fp8", heads * rows, latent), heads)
    return KvB(frame(heads * rows, latent, seed=2), heads)


@pytest.mark.parametrize(
    "kind, tokens, heads, nope, value, latent, rope",
    [
        ("bf16", 3, 2, 128, 40, 512, 64),
        ("fp8", 3, 2, 128, 128, 384, 64),
        ("fp8", 2, 3, 48, 24, 200, 6),
        ("bf16", 21, 3, 16, 24, 20, 6),
    ],
)
@pytest.mark.parametrize("held", DTYPES)
def test_absorbed_queries_and_cache_entries(kind, tokens, heads, nope, value, latent, rope, held):
    q, kv = frame(tokens, heads, nope + rope), frame(tokens, latent + rope, seed=1)
    k_b, weight = kv_b(kind, heads, nope + value, latent), torch.rand(latent) + 0.5
    tables = rope_cache.Tables(*map(torch.tensor, rope_tables(make(qk_rope_head_dim=rope), 256)))
    positions = torch.arange(tokens, dtype=torch.int32) * 7
    slots = torch.randperm(40, generator=seeded(0))[:tokens].int()
    slots[1] = -1
    results = []
    for absorb in (kernel.absorb, kernel.absorb_eager):
        cache = poisoned(8, 5, latent, rope, held)
        results.append((absorb(q, k_b, kv, weight, 1e-6, positions, slots, tables, cache), cache))
    (got, cache), (want, cache_twin) = results
    assert distance(got, want) < 2**-8
    assert_same_entries(cache, cache_twin, latent, count=tokens - 1)
