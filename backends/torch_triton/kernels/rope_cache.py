"""Rotary embedding of queries and keys, the latent's norm and the cache write, in one launch.

Shape letters: T tokens, H heads, C latent (kv_lora_rank), R rope dim, X = C + R, Z = R / 2 pairs, E width of a cache
entry.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.3; pairs are adjacent numbers, as in the checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..cache import to_entries
from . import entries, pdl
from .chips import check, chip_of, options
from .sizes import cdiv, power_of_2


class Tables(NamedTuple):
    """float32 [positions, R / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


@triton.jit
def rotated(pairs_HZ2, cos_HZ, sin_HZ):
    """Pairs of adjacent numbers [H, Z, 2], rotated."""
    even_HZ, odd_HZ = tl.split(pairs_HZ2.to(tl.float32))
    return tl.join(even_HZ * cos_HZ - odd_HZ * sin_HZ, even_HZ * sin_HZ + odd_HZ * cos_HZ)


@triton.jit
def rotated_words(pair_HZ, cos_1Z, sin_1Z):
    """Pairs of BF16 as words of 32 bits, rotated: nothing moves between threads, as it does when pairs are split."""
    even_HZ = (pair_HZ << 16).to(tl.float32, bitcast=True)
    odd_HZ = (pair_HZ & -65536).to(tl.float32, bitcast=True)
    low_HZ = (even_HZ * cos_1Z - odd_HZ * sin_1Z).to(tl.bfloat16).to(tl.uint16, bitcast=True)
    high_HZ = (even_HZ * sin_1Z + odd_HZ * cos_1Z).to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return low_HZ.to(tl.int32) | (high_HZ.to(tl.int32) << 16)


@triton.jit
def angles(position_ptr, cos_ptr, sin_ptr, t_T, valid_T, R: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Rows of the tables for tokens, [T, Z] each."""
    z_Z = tl.arange(0, BLOCK_Z)
    position_T = tl.load(position_ptr + t_T, mask=valid_T, other=0).to(tl.int64)
    place_TZ = (position_T * (R // 2))[:, None] + z_Z[None, :]
    mask_TZ = valid_T[:, None] & (z_Z < R // 2)[None, :]
    return tl.load(cos_ptr + place_TZ, mask=mask_TZ, other=0.0), tl.load(sin_ptr + place_TZ, mask=mask_TZ, other=0.0)


@triton.jit
def write_entries(
    kv_ptr, kv_stride, weight_C, eps, slot_ptr, cache_ptr, cache_stride_block, cache_stride_token, t_T, valid_T,
    cos_TZ, sin_TZ, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, INSTRUCTION: tl.constexpr,
):  # fmt: skip
    """The cache entries of tokens; ``weight_C`` is padded to a power of two."""
    c_C = tl.arange(0, weight_C.shape[0])
    r_Z2 = 2 * tl.arange(0, cos_TZ.shape[1])[:, None] + tl.arange(0, 2)[None, :]
    slot_T = tl.load(slot_ptr + t_T, mask=valid_T, other=-1).to(tl.int64)
    written_T = slot_T >= 0
    entry_ptrs_T = cache_ptr + slot_T // PAGE * cache_stride_block + slot_T % PAGE * cache_stride_token
    kv_ptrs_T = kv_ptr + t_T.to(tl.int64) * kv_stride
    mask_TC = written_T[:, None] & (c_C < C)[None, :]
    latent_TC = tl.load(kv_ptrs_T[:, None] + c_C[None, :], mask=mask_TC, other=0.0).to(tl.float32)
    scale_T = tl.rsqrt(tl.sum(latent_TC * latent_TC, 1) / C + eps)
    normed_TC = latent_TC * scale_T[:, None] * weight_C[None, :]
    entries.store_latents(entry_ptrs_T, normed_TC, written_T, C, INSTRUCTION)
    mask_TZ2 = written_T[:, None, None] & (r_Z2 < R)[None, :, :]
    key_TZ2 = tl.load(kv_ptrs_T[:, None, None] + C + r_Z2[None, :, :], mask=mask_TZ2, other=0.0)
    key_ptrs_TZ2 = entries.rope_keys(entry_ptrs_T, C)[:, None, None] + r_Z2[None, :, :]
    tl.store(key_ptrs_TZ2, rotated(key_TZ2, cos_TZ, sin_TZ), mask=mask_TZ2)


@triton.jit
def _rope_cache(
    kv_ptr, kv_stride, weight_ptr, eps, q_ptr, q_stride_t, q_stride_h, q_out_ptr, q_out_stride_t, q_out_stride_h,
    position_ptr, slot_ptr, cos_ptr, sin_ptr, cache_ptr, cache_stride_block, cache_stride_token, H, C: tl.constexpr,
    R: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Z: tl.constexpr,
    INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, 1 + tiles of H. The first program of a token does the key, the others its queries."""
    t = tl.program_id(0).to(tl.int64)
    t_T = t + tl.arange(0, 1)
    valid_T = t_T >= 0
    c_C = tl.arange(0, BLOCK_C)
    weight_C = tl.load(weight_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)
    pdl.wait(PDL)
    pdl.release(PDL)
    cos_TZ, sin_TZ = angles(position_ptr, cos_ptr, sin_ptr, t_T, valid_T, R, BLOCK_Z)
    if tl.program_id(1) == 0:
        write_entries(
            kv_ptr, kv_stride, weight_C, eps, slot_ptr, cache_ptr, cache_stride_block, cache_stride_token, t_T, valid_T,
            cos_TZ, sin_TZ, C, R, PAGE, INSTRUCTION,
        )  # fmt: skip
    else:
        z_Z = tl.arange(0, BLOCK_Z)
        h_H = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_HZ = (h_H < H)[:, None] & (z_Z < R // 2)[None, :]
        q_ptrs_HZ = q_ptr + t * q_stride_t + (h_H * q_stride_h)[:, None] + z_Z[None, :]
        out_ptrs_HZ = q_out_ptr + t * q_out_stride_t + (h_H * q_out_stride_h)[:, None] + z_Z[None, :]
        tl.store(out_ptrs_HZ, rotated_words(tl.load(q_ptrs_HZ, mask=mask_HZ, other=0), cos_TZ, sin_TZ), mask=mask_HZ)


def rope_cache(
    kv_TX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    q_rope_THR: torch.Tensor,
    q_out_THR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    tables: Tables,
    cache: torch.Tensor,
) -> None:
    """Write the tokens' entries of norm(latent) and rope(key) into ``cache`` [blocks, block_size, E], BF16 or FP8, and
    the rotated queries.

    ``kv_TX``: down-projected latent and key, BF16 or FP32; ``q_rope_THR`` BF16, a view of the queries; ``q_out_THR``
    BF16, where attention reads them (the same view, or the end of absorbed queries); pairs of both lie at even places;
    ``slots_T``: block * block_size + offset, negative for padding.
    """
    name = "rope_cache"
    tokens, heads, rope = q_rope_THR.shape
    latent = len(weight_C)
    check(kv_TX.shape == (tokens, latent + rope), f"keys {tuple(kv_TX.shape)}", name)
    entries.check_cache(cache, latent, rope, name)
    check(q_out_THR.shape == q_rope_THR.shape, f"room for queries {tuple(q_out_THR.shape)}", name)
    check(len(positions_T) == len(slots_T) == tokens, "one position and one slot per token", name)
    check(positions_T.is_contiguous() and slots_T.is_contiguous(), "positions and slots must be contiguous", name)
    cos, sin = tables
    contiguous = all(x.stride(-1) == 1 for x in (kv_TX, q_rope_THR, q_out_THR))
    check(contiguous and cos.is_contiguous() and sin.is_contiguous(), "rows must be contiguous", name)
    check(cos.shape[1] == sin.shape[1] == rope // 2, f"tables of {cos.shape[1]} pairs", name)
    chip = chip_of(cache.device)
    q_words_THZ, out_words_THZ = (_words(x, name) for x in (q_rope_THR, q_out_THR))
    block_h = min(32, power_of_2(heads))
    _rope_cache[(tokens, 1 + cdiv(heads, block_h))](
        kv_TX, kv_TX.stride(0), weight_C, eps, q_words_THZ, *q_words_THZ.stride()[:2], out_words_THZ,
        *out_words_THZ.stride()[:2], positions_T, slots_T, cos, sin, cache, *cache.stride()[:2], heads, latent, rope,
        PAGE=cache.shape[1], BLOCK_H=block_h, BLOCK_C=power_of_2(latent),
        BLOCK_Z=power_of_2(rope // 2), INSTRUCTION=chip.encodes_fp8, PDL=chip.dependent_launch,
        **options(chip, 4),
    )  # fmt: skip


def _words(x_THR: torch.Tensor, name: str) -> torch.Tensor:
    """The pairs of BF16 numbers as int32 [T, H, Z]."""
    even = all(stride % 2 == 0 for stride in x_THR.stride()[:2]) and x_THR.storage_offset() % 2 == 0
    check(x_THR.dtype == torch.bfloat16 and even, f"queries in {x_THR.dtype} with strides {x_THR.stride()}", name)
    return x_THR.view(torch.int32)


def _rotate_eager(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rope_cache_eager(
    kv_TX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    q_rope_THR: torch.Tensor,
    q_out_THR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    tables: Tables,
    cache: torch.Tensor,
) -> None:
    """The twin of `rope_cache`."""
    latent = len(weight_C)
    kv_TX = kv_TX.float()
    cos_TZ, sin_TZ = (table[positions_T.long()] for table in tables)
    q_out_THR.copy_(_rotate_eager(q_rope_THR, cos_TZ[:, None], sin_TZ[:, None]))
    latent_TC = kv_TX[:, :latent]
    normed_TC = latent_TC * torch.rsqrt(latent_TC.square().mean(-1, keepdim=True) + eps) * weight_C.float()
    values_TX = torch.cat([normed_TC, _rotate_eager(kv_TX[:, latent:], cos_TZ, sin_TZ)], 1)
    real_T = slots_T >= 0
    slots = slots_T[real_T].long()
    cache[slots // cache.shape[1], slots % cache.shape[1]] = to_entries(values_TX[real_T], latent, cache.dtype)
