"""Entries of the latent cache, BF16 or FP8 (`..cache` has the layouts), as functions for kernels; and reading many.

In a kernel the cache's pointer says which it is: BF16, or bytes.

Shape letters: T tokens, S entries read, C latent (kv_lora_rank), R rope dim, X = C + R, Z = R / 2 pairs, E width of an
entry in the cache's dtype, G groups of 128 latent values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....models.costs import CACHE_GROUP
from ..cache import FP8_CACHE, from_entries
from . import e4m3, pdl
from .chips import check, chip_of, options
from .quant import quantise_groups
from .sizes import cdiv, power_of_2


@triton.jit
def rope_keys(entry_ptrs, C: tl.constexpr):
    """Pointers to the BF16 rope keys of entries."""
    if entry_ptrs.dtype.element_ty == tl.uint8:
        starts = (entry_ptrs + (C + (C + 127) // 128 * 4)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        starts = entry_ptrs + C
    return starts


@triton.jit
def store_latents(entry_ptrs_T, latent_TC, mask_T, C: tl.constexpr, INSTRUCTION: tl.constexpr):
    """FP32 latents, padded to a power of two, into entries."""
    T: tl.constexpr = latent_TC.shape[0]
    BLOCK_C: tl.constexpr = latent_TC.shape[1]
    c_C = tl.arange(0, BLOCK_C)
    mask_TC = mask_T[:, None] & (c_C < C)[None, :]
    if entry_ptrs_T.dtype.element_ty == tl.uint8:
        GROUP: tl.constexpr = min(128, BLOCK_C)
        GROUPS: tl.constexpr = BLOCK_C // GROUP
        latent_GX = tl.reshape(tl.where(mask_TC, latent_TC, 0.0), (T * GROUPS, GROUP))
        codes_GX, scale_G = quantise_groups(latent_GX, True, False, INSTRUCTION)
        tl.store(entry_ptrs_T[:, None] + c_C[None, :], tl.reshape(codes_GX, (T, BLOCK_C)), mask=mask_TC)
        g_G = tl.arange(0, GROUPS)
        scale_ptrs_T = (entry_ptrs_T + C).to(tl.pointer_type(tl.float32), bitcast=True)
        scale_TG = tl.reshape(scale_G, (T, GROUPS))
        tl.store(scale_ptrs_T[:, None] + g_G[None, :], scale_TG, mask=mask_T[:, None] & (g_G * GROUP < C)[None, :])
    else:
        tl.store(entry_ptrs_T[:, None] + c_C[None, :], latent_TC, mask=mask_TC)


@triton.jit
def prefetch(entry_ptrs_S, mask_S, C: tl.constexpr, R: tl.constexpr):
    """Bring entries to the L2 cache, but for the end of an FP8 one that does not begin with a line."""
    LINE: tl.constexpr = 1024 // entry_ptrs_S.dtype.element_ty.primitive_bitwidth
    WIDTH: tl.constexpr = C + R if LINE == 64 else C + (C + 127) // 128 * 4 + 2 * R
    e_L = tl.arange(0, triton.next_power_of_2((WIDTH + LINE - 1) // LINE)) * LINE
    pdl.prefetch(entry_ptrs_S[:, None] + e_L[None, :], mask_S[:, None] & (e_L < WIDTH)[None, :])


@triton.jit
def load_latents(entry_ptrs_S, mask_S, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Latents as entries hold them, [S, BLOCK_C], and their scales [S, G], zeros in BF16; zeros where masked."""
    S: tl.constexpr = entry_ptrs_S.shape[0]
    GROUP: tl.constexpr = min(128, BLOCK_C)
    GROUPS: tl.constexpr = BLOCK_C // GROUP
    c_C = tl.arange(0, BLOCK_C)
    mask_SC = tl.broadcast_to(mask_S[:, None], (S, BLOCK_C))
    if C != BLOCK_C:
        mask_SC &= (c_C < C)[None, :]
    held_SC = tl.load(entry_ptrs_S[:, None] + c_C[None, :], mask=mask_SC, other=0)
    scale_SG = tl.zeros((S, GROUPS), tl.float32)
    if entry_ptrs_S.dtype.element_ty == tl.uint8:
        g_G = tl.arange(0, GROUPS)
        scale_ptrs_S = (entry_ptrs_S + C).to(tl.pointer_type(tl.float32), bitcast=True)
        mask_SG = tl.broadcast_to(mask_S[:, None], (S, GROUPS))
        if C != BLOCK_C:
            mask_SG &= (g_G * GROUP < C)[None, :]
        scale_SG = tl.load(scale_ptrs_S[:, None] + g_G[None, :], mask=mask_SG, other=0.0)
    return held_SC, scale_SG


@triton.jit
def latents(held_SC, scale_SG, INSTRUCTION: tl.constexpr):
    """The BF16 latents of what `load_latents` gives."""
    if held_SC.dtype == tl.uint8:
        S: tl.constexpr = held_SC.shape[0]
        BLOCK_C: tl.constexpr = held_SC.shape[1]
        GROUPS: tl.constexpr = scale_SG.shape[1]
        codes_SC = held_SC.to(tl.float8e4nv, bitcast=True) if INSTRUCTION else held_SC
        code_SGX = tl.reshape(e4m3.decode(codes_SC), (S, GROUPS, BLOCK_C // GROUPS))
        latent_SC = tl.reshape(code_SGX * scale_SG[:, :, None], (S, BLOCK_C)).to(tl.bfloat16)
    else:
        latent_SC = held_SC
    return latent_SC


@triton.jit
def _read(
    cache_ptr, stride_block, stride_token, slot_ptr, out_ptr, S, PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of S."""
    s_S = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_S = s_S < S
    c_C = tl.arange(0, BLOCK_C)
    r_R = tl.arange(0, BLOCK_R)
    pdl.wait(PDL)
    pdl.release(PDL)
    slot_S = tl.load(slot_ptr + s_S, mask=mask_S, other=0).to(tl.int64)
    entry_ptrs_S = cache_ptr + slot_S // PAGE * stride_block + slot_S % PAGE * stride_token
    out_ptrs_S = out_ptr + s_S * (C + R)
    held_SC, scale_SG = load_latents(entry_ptrs_S, mask_S, C, BLOCK_C)
    latent_SC = latents(held_SC, scale_SG, INSTRUCTION)
    tl.store(out_ptrs_S[:, None] + c_C[None, :], latent_SC, mask=mask_S[:, None] & (c_C < C)[None, :])
    mask_SR = mask_S[:, None] & (r_R < R)[None, :]
    rope_SR = tl.load(rope_keys(entry_ptrs_S, C)[:, None] + r_R[None, :], mask=mask_SR, other=0.0)
    tl.store(out_ptrs_S[:, None] + C + r_R[None, :], rope_SR, mask=mask_SR)


def check_cache(cache: torch.Tensor, latent: int, rope: int, kernel: str) -> None:
    """Refuse what is neither a BF16 nor an FP8 cache of such entries."""
    width = latent + rope
    if cache.dtype == FP8_CACHE:
        width = latent + 4 * cdiv(latent, CACHE_GROUP) + 2 * rope
        aligned = not any(number % 4 for number in (latent, *cache.stride()[:2]))
        check(aligned, f"FP8 cache of latents of {latent} with strides {cache.stride()}", kernel)
    check(cache.dim() == 3 and cache.shape[2] == width, f"cache {tuple(cache.shape)}, not of {width}", kernel)
    check(cache.dtype in (torch.bfloat16, FP8_CACHE), f"cache in {cache.dtype}", kernel)
    check(cache.stride(2) == 1, "entries must be contiguous", kernel)


def read_entries(cache: torch.Tensor, slots_S: torch.Tensor, latent: int, rope: int) -> torch.Tensor:
    """BF16 [S, C + R], the values of entries of ``cache`` [blocks, block_size, E], BF16 or FP8.

    ``slots_S``: block * block_size + offset.
    """
    check_cache(cache, latent, rope, "read_entries")
    check(slots_S.is_contiguous(), "slots must be contiguous", "read_entries")
    chip = chip_of(cache.device)
    out = torch.empty(len(slots_S), latent + rope, dtype=torch.bfloat16, device=cache.device)
    block_s = 16
    _read[(cdiv(len(slots_S), block_s),)](
        cache, *cache.stride()[:2], slots_S, out, len(slots_S), PAGE=cache.shape[1], C=latent, R=rope, BLOCK_S=block_s,
        BLOCK_C=power_of_2(latent), BLOCK_R=power_of_2(rope), INSTRUCTION=chip.decodes_fp8,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out


def read_entries_eager(cache: torch.Tensor, slots_S: torch.Tensor, latent: int, rope: int) -> torch.Tensor:
    """The twin of `read_entries`."""
    page = cache.shape[1]
    slots_S = slots_S.long()
    return from_entries(cache[slots_S // page, slots_S % page], latent, torch.bfloat16)
