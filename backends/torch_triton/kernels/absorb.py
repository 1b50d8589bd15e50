"""A few tokens' way into the space of latents: one launch before decode attention where three would do the same.

Queries are multiplied by the keys' half of kv_b, which is read before waiting for what is ahead; their other part is
rotated; and the tokens' cache entries are written. Of many tokens a library's products are faster.

Shape letters: T tokens, H heads, N nope dim, C latent (kv_lora_rank), R rope dim, X = C + R, Z = R / 2 pairs, J columns
of a tile of C, Y rows of kv_b of a head.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import entries, kv_b, pdl
from .chips import check, chip_of, options
from .kv_b import KvB, check_kv_b, columns_of_piece
from .rope_cache import Tables, angles, rope_cache_eager, rotated, write_entries
from .sizes import cdiv, power_of_2

_SPLITS = 2  # programs of a head


@triton.jit
def _absorb(
    q_ptr, q_stride_t, q_stride_h, kv_b_ptr, kv_b_stride, scales_ptr, scales_stride, out_ptr, out_stride_t,
    out_stride_h, kv_ptr, kv_stride, weight_ptr, eps, position_ptr, slot_ptr, cos_ptr, sin_ptr, cache_ptr,
    cache_stride_block, cache_stride_token, T, H, Y, N, C: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_Z: tl.constexpr, IN_BLOCK: tl.constexpr, INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: SPLITS programs of each head, then one for the keys; tiles of T."""
    t_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid_T = t_T < T
    h = tl.program_id(0) // SPLITS
    if h < H:
        n_N = tl.arange(0, BLOCK_N)
        start = tl.program_id(0) % SPLITS * BLOCK_J
        k_b_NJ = kv_b.head_rows(
            kv_b_ptr, kv_b_stride, scales_ptr, scales_stride, h * Y, BLOCK_N, N, start, BLOCK_J, C, IN_BLOCK
        )
        pdl.wait(PDL)
        pdl.release(PDL)
        q_ptrs_T = q_ptr + t_T.to(tl.int64) * q_stride_t + h * q_stride_h
        q_TN = tl.load(q_ptrs_T[:, None] + n_N[None, :], mask=valid_T[:, None] & (n_N < N)[None, :], other=0.0)
        out_ptrs_T = out_ptr + t_T.to(tl.int64) * out_stride_t + h * out_stride_h
        latent_TJ = tl.dot(q_TN, k_b_NJ)
        j_J = start + tl.arange(0, BLOCK_J)
        tl.store(out_ptrs_T[:, None] + j_J[None, :], latent_TJ, mask=valid_T[:, None] & (j_J < C)[None, :])
        if tl.program_id(0) % SPLITS == 0:
            cos_TZ, sin_TZ = angles(position_ptr, cos_ptr, sin_ptr, t_T, valid_T, R, BLOCK_Z)
            r_Z2 = 2 * tl.arange(0, BLOCK_Z)[:, None] + tl.arange(0, 2)[None, :]
            mask_TZ2 = valid_T[:, None, None] & (r_Z2 < R)[None, :, :]
            q_TZ2 = tl.load(q_ptrs_T[:, None, None] + N + r_Z2[None, :, :], mask=mask_TZ2, other=0.0)
            rotated_TZ2 = rotated(q_TZ2, cos_TZ, sin_TZ)
            tl.store(out_ptrs_T[:, None, None] + C + r_Z2[None, :, :], rotated_TZ2, mask=mask_TZ2)
    else:
        c_C = tl.arange(0, BLOCK_C)
        weight_C = tl.load(weight_ptr + c_C, mask=c_C < C, other=0.0).to(tl.float32)
        pdl.wait(PDL)
        pdl.release(PDL)
        cos_TZ, sin_TZ = angles(position_ptr, cos_ptr, sin_ptr, t_T, valid_T, R, BLOCK_Z)
        write_entries(
            kv_ptr, kv_stride, weight_C, eps, slot_ptr, cache_ptr, cache_stride_block, cache_stride_token, t_T, valid_T,
            cos_TZ, sin_TZ, C, R, PAGE, INSTRUCTION,
        )  # fmt: skip


def absorb(
    q_THY: torch.Tensor,
    weights: KvB,
    kv_TX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    tables: Tables,
    cache: torch.Tensor,
) -> torch.Tensor:
    """Queries for `mla_decode.attend`, BF16 [T, H, C + R], from unrotated ones [T, H, N + R]; and the tokens' entries.

    ``kv_TX``, ``weight_C``, ``eps``, ``positions_T``, ``slots_T`` and ``cache`` as in `rope_cache`.
    """
    name = "absorb"
    tokens, heads, width = q_THY.shape
    latent = len(weight_C)
    rope = kv_TX.shape[1] - latent
    nope = width - rope
    check_kv_b(weights, heads, latent, name)
    check(kv_TX.shape == (tokens, latent + rope), f"keys {tuple(kv_TX.shape)}", name)
    entries.check_cache(cache, latent, rope, name)
    check(len(positions_T) == len(slots_T) == tokens, "one position and one slot per token", name)
    contiguous = all(x.stride(-1) == 1 for x in (q_THY, kv_TX, positions_T, slots_T))
    check(contiguous and tables.cos.is_contiguous() and tables.sin.is_contiguous(), "rows must be contiguous", name)
    check(tables.cos.shape[1] == rope // 2, f"tables of {tables.cos.shape[1]} pairs", name)
    chip = chip_of(cache.device)
    out = torch.empty(tokens, heads, latent + rope, dtype=torch.bfloat16, device=cache.device)
    block_t = 16
    block_c = power_of_2(latent)
    block_j = min(columns_of_piece(latent, chip), max(16, block_c // _SPLITS))
    splits = cdiv(latent, block_j)
    _absorb[(heads * splits + 1, cdiv(tokens, block_t))](
        q_THY, *q_THY.stride()[:2], *weights.arguments(chip), out, *out.stride()[:2], kv_TX, kv_TX.stride(0), weight_C,
        eps, positions_T, slots_T, *tables, cache, *cache.stride()[:2], tokens, heads, weights.rows, nope, latent, rope,
        SPLITS=splits, PAGE=cache.shape[1], BLOCK_T=block_t, BLOCK_N=max(16, power_of_2(nope)),
        BLOCK_J=block_j, BLOCK_C=block_c, BLOCK_Z=power_of_2(rope // 2),
        IN_BLOCK=weights.in_block(0, nope, block_j), INSTRUCTION=chip.encodes_fp8, PDL=chip.dependent_launch,
        **options(chip, 8),
    )  # fmt: skip
    return out


def absorb_eager(
    q_THY: torch.Tensor,
    weights: KvB,
    kv_TX: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    tables: Tables,
    cache: torch.Tensor,
) -> torch.Tensor:
    """The twin of `absorb`."""
    latent = len(weight_C)
    nope = q_THY.shape[2] - (kv_TX.shape[1] - latent)
    latents_THC = torch.einsum("thn,hnc->thc", q_THY[:, :, :nope].float(), weights.plain()[:, :nope].float())
    out = torch.cat([latents_THC.bfloat16(), q_THY[:, :, nope:]], dim=2)
    q_rope_THR = q_THY[:, :, nope:]
    rope_cache_eager(kv_TX, weight_C, eps, q_rope_THR, out[:, :, latent:], positions_T, slots_T, tables, cache)
    return out
