"""Entries of an FP8 cache against their definition in numpy."""

import numpy as np
import pytest
import torch

from deepspan.backends.torch_triton.cache import FP8_CACHE, empty_cache, from_entries, to_entries
from deepspan.models.catalog import load_spec
from deepspan.models.dtypes import F8_E4M3_VALUES, bf16_to_f32, f32_to_bf16
from deepspan.models.quantise import quantise_activation_fp8

CASES = [(512, 64), (24, 8), (132, 6)]


def values(latent, rope, tokens=9):
    spread = np.exp(np.random.default_rng(1).normal(0, 3, (tokens, 1)))
    drawn = np.random.default_rng(0).normal(0, 1, (tokens, latent + rope)) * spread
    drawn[0] = 0
    return drawn.astype(np.float32)


@pytest.mark.parametrize(("latent", "rope"), CASES)
def test_an_entry_is_codes_then_scales_then_the_rope_key(latent, rope):
    wanted = values(latent, rope)
    groups = -(-latent // 128)
    entries = to_entries(torch.from_numpy(wanted), latent, FP8_CACHE).numpy()
    assert entries.shape == (len(wanted), latent + 4 * groups + 2 * rope)
    padded = np.pad(wanted[:, :latent], ((0, 0), (0, -latent % 128)))
    codes, scales = quantise_activation_fp8(padded, ue8m0=True)
    np.testing.assert_array_equal(entries[:, :latent], codes[:, :latent])
    np.testing.assert_array_equal(entries[:, latent : latent + 4 * groups].copy().view(np.float32), scales)
    rope_keys = entries[:, latent + 4 * groups :].copy().view(np.uint16)
    np.testing.assert_array_equal(rope_keys, f32_to_bf16(wanted[:, latent:]))


@pytest.mark.parametrize(("latent", "rope"), CASES)
def test_values_that_are_read_are_exact_in_bf16(latent, rope):
    entries = to_entries(torch.from_numpy(values(latent, rope)), latent, FP8_CACHE)
    read = from_entries(entries, latent, torch.float32)
    groups = -(-latent // 128)
    scales = entries[:, latent : latent + 4 * groups].numpy().copy().view(np.float32)
    multipliers = scales.repeat(128, 1)[:, :latent]
    np.testing.assert_array_equal(read[:, :latent].numpy(), F8_E4M3_VALUES[entries[:, :latent].numpy()] * multipliers)
    keys = entries[:, latent + 4 * groups :].numpy().copy().view(np.uint16)
    np.testing.assert_array_equal(read[:, latent:].numpy(), bf16_to_f32(keys))
    assert torch.equal(from_entries(entries, latent, torch.bfloat16).float(), read)
    again = from_entries(to_entries(read, latent, FP8_CACHE), latent, torch.float32)
    assert torch.equal(again, read)


def test_an_entry_of_v3_has_656_bytes():
    cache = empty_cache(load_spec("deepseek_v3"), "fp8", 2, 3, 4)
    assert cache.shape == (2, 3, 4, 656) and cache.element_size() == 1
    assert not from_entries(cache, 512, torch.float32).any()
