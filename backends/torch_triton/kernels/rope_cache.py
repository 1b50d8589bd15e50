"""Rotary embedding of queries and keys, the latent's norm and the cache write, in one launch.

Shape letters: T tokens, H heads, C latent (kv_lora_rank), R rope dim, X = C + R, Z = R / 2 pairs, P partial results.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.3; pairs are adjacent numbers, as in the checkpoints.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options


@triton.jit
def _rotated(ptrs_Z, parts, part_stride, cos_Z, sin_Z, mask_Z):
    """Both numbers of each pair, rotated; ``ptrs_Z`` point at the first ones."""
    even_Z = tl.zeros(cos_Z.shape, tl.float32)
    odd_Z = tl.zeros(cos_Z.shape, tl.float32)
    for p in range(parts):
        even_Z += tl.load(ptrs_Z + p * part_stride, mask=mask_Z, other=0.0).to(tl.float32)
        odd_Z += tl.load(ptrs_Z + p * part_stride + 1, mask=mask_Z, other=0.0).to(tl.float32)
    return even_Z * cos_Z - odd_Z * sin_Z, even_Z * sin_Z + odd_Z * cos_Z


@triton.jit
def _rope_cache(
    kv_ptr, kv_stride_t, kv_stride_p, weight_ptr, eps, q_ptr, q_stride_t, q_stride_h, q_out_ptr, q_out_stride_t,
    q_out_stride_h, position_ptr, slot_ptr, cos_ptr, sin_ptr, cache_ptr, cache_stride_block, cache_stride_token, H, C,
    R, P, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Z: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, 1 + tiles of H. The first program of a token does the key, the others its queries."""
    t = tl.program_id(0).to(tl.int64)
    z_Z = tl.arange(0, BLOCK_Z)
    mask_Z = z_Z < R // 2
    pdl.wait(PDL)
    pdl.release(PDL)
    position = tl.load(position_ptr + t).to(tl.int64)
    cos_Z = tl.load(cos_ptr + position * (R // 2) + z_Z, mask=mask_Z, other=0.0)
    sin_Z = tl.load(sin_ptr + position * (R // 2) + z_Z, mask=mask_Z, other=0.0)
    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + t).to(tl.int64)
        if slot >= 0:
            entry_ptr = cache_ptr + slot // PAGE * cache_stride_block + slot % PAGE * cache_stride_token
            kv_ptr += t * kv_stride_t
            c_C = tl.arange(0, BLOCK_C)
            latent_C = tl.zeros((BLOCK_C,), tl.float32)
            for p in range(P):
                latent_C += tl.load(kv_ptr + p * kv_stride_p + c_C, mask=c_C < C, other=0.0).to(tl.float32)
            weight_C = tl.load(weight_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)
            normed_C = latent_C * tl.rsqrt(tl.sum(latent_C * latent_C, 0) / C + eps) * weight_C
            tl.store(entry_ptr + c_C, normed_C, mask=c_C < C)
            first_Z, second_Z = _rotated(kv_ptr + C + 2 * z_Z, P, kv_stride_p, cos_Z, sin_Z, mask_Z)
            tl.store(entry_ptr + C + 2 * z_Z, first_Z, mask=mask_Z)
            tl.store(entry_ptr + C + 2 * z_Z + 1, second_Z, mask=mask_Z)
    else:
        h_H = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_HZ = (h_H < H)[:, None] & mask_Z[None, :]
        q_ptrs_HZ = q_ptr + t * q_stride_t + (h_H * q_stride_h)[:, None] + 2 * z_Z[None, :]
        cos_HZ = tl.broadcast_to(cos_Z[None, :], (BLOCK_H, BLOCK_Z))
        sin_HZ = tl.broadcast_to(sin_Z[None, :], (BLOCK_H, BLOCK_Z))
        first_HZ, second_HZ = _rotated(q_ptrs_HZ, 1, 0, cos_HZ, sin_HZ, mask_HZ)
        out_ptrs_HZ = q_out_ptr + t * q_out_stride_t + (h_H * q_out_stride_h)[:, None] + 2 * z_Z[None, :]
        tl.store(out_ptrs_HZ, first_HZ, mask=mask_HZ)
        tl.store(out_ptrs_HZ + 1, second_HZ, mask=mask_HZ)


def rope_cache(
    kv_TPX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    q_rope_THR: torch.Tensor,
    q_out_THR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """Write the tokens' cache entries [norm(latent) | rope(key)] and the rotated queries.

    ``kv_TPX``: down-projected [T, C + R], or partial results [T, P, C + R] to be added; ``q_rope_THR`` BF16, a view
    of the queries; ``q_out_THR`` BF16, where attention reads them (the same view, or the end of absorbed queries);
    ``slots_T``: block * block_size + offset, negative for padding; ``cos``, ``sin`` float32 [positions, R / 2].
    """
    name = "rope_cache"
    tokens, heads, rope = q_rope_THR.shape
    latent = len(weight_C)
    parts = kv_TPX.shape[1] if kv_TPX.dim() == 3 else 1
    check(kv_TPX.shape[0] == tokens and kv_TPX.shape[-1] == latent + rope, f"keys {tuple(kv_TPX.shape)}", name)
    check(cache.dim() == 3 and cache.shape[2] == latent + rope, f"cache {tuple(cache.shape)}", name)
    check(q_out_THR.shape == q_rope_THR.shape, f"room for queries {tuple(q_out_THR.shape)}", name)
    check(len(positions_T) == len(slots_T) == tokens, "one position and one slot per token", name)
    check(positions_T.is_contiguous() and slots_T.is_contiguous(), "positions and slots must be contiguous", name)
    contiguous = all(x.stride(-1) == 1 for x in (kv_TPX, q_rope_THR, q_out_THR, cache))
    check(contiguous and cos.is_contiguous() and sin.is_contiguous(), "rows must be contiguous", name)
    check(cos.shape[1] == sin.shape[1] == rope // 2, f"tables of {cos.shape[1]} pairs", name)
    chip = chip_of(cache.device)
    block_h = min(32, triton.next_power_of_2(heads))
    _rope_cache[(tokens, 1 + triton.cdiv(heads, block_h))](
        kv_TPX, kv_TPX.stride(0), kv_TPX.stride(1) if kv_TPX.dim() == 3 else 0, weight_C, eps, q_rope_THR,
        *q_rope_THR.stride()[:2], q_out_THR, *q_out_THR.stride()[:2], positions_T, slots_T, cos, sin, cache,
        *cache.stride()[:2], heads, latent, rope, parts, PAGE=cache.shape[1], BLOCK_H=block_h,
        BLOCK_C=triton.next_power_of_2(latent), BLOCK_Z=triton.next_power_of_2(rope // 2), PDL=chip.dependent_launch,
        **options(chip, 4),
    )  # fmt: skip


def _rotate_eager(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rope_cache_eager(
    kv_TPX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    q_rope_THR: torch.Tensor,
    q_out_THR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """The twin of `rope_cache`."""
    latent = len(weight_C)
    kv_TX = kv_TPX.float().sum(1) if kv_TPX.dim() == 3 else kv_TPX.float()
    cos_TZ, sin_TZ = cos[positions_T.long()], sin[positions_T.long()]
    q_out_THR.copy_(_rotate_eager(q_rope_THR, cos_TZ[:, None], sin_TZ[:, None]))
    latent_TC = kv_TX[:, :latent]
    normed_TC = latent_TC * torch.rsqrt(latent_TC.square().mean(-1, keepdim=True) + eps) * weight_C.float()
    entries_TX = torch.cat([normed_TC, _rotate_eager(kv_TX[:, latent:], cos_TZ, sin_TZ)], 1).to(cache.dtype)
    real_T = slots_T >= 0
    slots = slots_T[real_T].long()
    cache[slots // cache.shape[1], slots % cache.shape[1]] = entries_TX[real_T]
