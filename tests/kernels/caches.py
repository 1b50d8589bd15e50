"""Caches for kernels: views with odd strides inside memory whose every number is NaN, read as BF16, FP8 or FP32."""

import torch

from deepspan.backends.torch_triton.cache import FP8_CACHE, from_entries, to_entries

DTYPES = [torch.bfloat16, FP8_CACHE]


def poisoned(blocks, page, latent, rope, dtype):
    """A cache [blocks, page, E] of NaN."""
    width = to_entries(torch.zeros(latent + rope), latent, dtype).numel()
    if dtype == FP8_CACHE:
        return torch.full((blocks, page + 1, width + 12), 255, dtype=dtype)[:, :page, :width]
    return torch.full((blocks, page + 1, width + 5), torch.nan, dtype=dtype)[:, :page, :width]


def assert_same_entries(got, want, latent, count):
    """``count`` entries were written, the same in both caches to one ulp; one code in fifty may be its neighbour."""
    values, wanted = (from_entries(cache, latent, torch.float32) for cache in (got, want))
    if got.dtype == FP8_CACHE:
        torch.testing.assert_close(values[..., :latent], wanted[..., :latent], rtol=2**-3, atol=1e-3, equal_nan=True)
        assert (got != want).float().mean() < 0.02 * count / (got.shape[0] * got.shape[1])
        values, wanted = values[..., latent:], wanted[..., latent:]
    torch.testing.assert_close(values, wanted, rtol=2**-7, atol=1e-6, equal_nan=True)
    assert int(values.isfinite().all(-1).sum()) == count
    untouched = got[values.isnan().any(-1)]
    assert bool((untouched == 255).all() if got.dtype == FP8_CACHE else untouched.isnan().all())
