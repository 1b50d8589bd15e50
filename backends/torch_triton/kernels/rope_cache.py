"""Rotary embedding of queries and keys, the latent's norm and the cache write, in one launch.

Shape letters: T tokens, H heads, C latent (kv_lora_rank), R rope dim, X = C + R, Z = R / 2 pairs.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.3; pairs are adjacent numbers, as in the checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options


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
def _rope_cache(
    kv_ptr, kv_stride, weight_ptr, eps, q_ptr, q_stride_t, q_stride_h, q_out_ptr, q_out_stride_t, q_out_stride_h,
    position_ptr, slot_ptr, cos_ptr, sin_ptr, cache_ptr, cache_stride_block, cache_stride_token, H, C, R,
    PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Z: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, 1 + tiles of H. The first program of a token does the key, the others its queries."""
    t = tl.program_id(0).to(tl.int64)
    z_Z = tl.arange(0, BLOCK_Z)
    mask_Z = z_Z < R // 2
    r_Z2 = 2 * z_Z[:, None] + tl.arange(0, 2)[None, :]
    c_C = tl.arange(0, BLOCK_C)
    weight_C = tl.load(weight_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)
    pdl.wait(PDL)
    pdl.release(PDL)
    position = tl.load(position_ptr + t).to(tl.int64)
    cos_Z = tl.load(cos_ptr + position * (R // 2) + z_Z, mask=mask_Z, other=0.0)
    sin_Z = tl.load(sin_ptr + position * (R // 2) + z_Z, mask=mask_Z, other=0.0)
    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + t).to(tl.int64)
        if slot >= 0:
            entry_ptr = cache_ptr + slot // PAGE * cache_stride_block + slot % PAGE * cache_stride_token
            kv_ptr += t * kv_stride
            latent_C = tl.load(kv_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)
            normed_C = latent_C * tl.rsqrt(tl.sum(latent_C * latent_C, 0) / C + eps) * weight_C
            tl.store(entry_ptr + c_C, normed_C, mask=c_C < C)
            key_Z2 = tl.load(kv_ptr + C + r_Z2, mask=mask_Z[:, None], other=0.0)
            tl.store(entry_ptr + C + r_Z2, rotated(key_Z2, cos_Z, sin_Z), mask=mask_Z[:, None])
    else:
        h_H = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_HZ2 = (h_H < H)[:, None, None] & mask_Z[None, :, None]
        q_ptrs_HZ2 = q_ptr + t * q_stride_t + (h_H * q_stride_h)[:, None, None] + r_Z2[None, :, :]
        q_HZ2 = tl.load(q_ptrs_HZ2, mask=mask_HZ2, other=0.0)
        cos_HZ = tl.broadcast_to(cos_Z[None, :], (BLOCK_H, BLOCK_Z))
        sin_HZ = tl.broadcast_to(sin_Z[None, :], (BLOCK_H, BLOCK_Z))
        out_ptrs_HZ2 = q_out_ptr + t * q_out_stride_t + (h_H * q_out_stride_h)[:, None, None] + r_Z2[None, :, :]
        tl.store(out_ptrs_HZ2, rotated(q_HZ2, cos_HZ, sin_HZ), mask=mask_HZ2)


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
    """Write the tokens' cache entries [norm(latent) | rope(key)] and the rotated queries.

    ``kv_TX``: down-projected latent and key, BF16 or FP32; ``q_rope_THR`` BF16, a view of the queries; ``q_out_THR``
    BF16, where attention reads them (the same view, or the end of absorbed queries);
    ``slots_T``: block * block_size + offset, negative for padding.
    """
    name = "rope_cache"
    tokens, heads, rope = q_rope_THR.shape
    latent = len(weight_C)
    check(kv_TX.shape == (tokens, latent + rope), f"keys {tuple(kv_TX.shape)}", name)
    check(cache.dim() == 3 and cache.shape[2] == latent + rope, f"cache {tuple(cache.shape)}", name)
    check(q_out_THR.shape == q_rope_THR.shape, f"room for queries {tuple(q_out_THR.shape)}", name)
    check(len(positions_T) == len(slots_T) == tokens, "one position and one slot per token", name)
    check(positions_T.is_contiguous() and slots_T.is_contiguous(), "positions and slots must be contiguous", name)
    cos, sin = tables
    contiguous = all(x.stride(-1) == 1 for x in (kv_TX, q_rope_THR, q_out_THR, cache))
    check(contiguous and cos.is_contiguous() and sin.is_contiguous(), "rows must be contiguous", name)
    check(cos.shape[1] == sin.shape[1] == rope // 2, f"tables of {cos.shape[1]} pairs", name)
    chip = chip_of(cache.device)
    block_h = min(16, triton.next_power_of_2(heads))
    _rope_cache[(tokens, 1 + triton.cdiv(heads, block_h))](
        kv_TX, kv_TX.stride(0), weight_C, eps, q_rope_THR, *q_rope_THR.stride()[:2], q_out_THR,
        *q_out_THR.stride()[:2], positions_T, slots_T, cos, sin, cache, *cache.stride()[:2], heads, latent, rope,
        PAGE=cache.shape[1], BLOCK_H=block_h, BLOCK_C=triton.next_power_of_2(latent),
        BLOCK_Z=triton.next_power_of_2(rope // 2), PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip


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
    entries_TX = torch.cat([normed_TC, _rotate_eager(kv_TX[:, latent:], cos_TZ, sin_TZ)], 1).to(cache.dtype)
    real_T = slots_T >= 0
    slots = slots_T[real_T].long()
    cache[slots // cache.shape[1], slots % cache.shape[1]] = entries_TX[real_T]
