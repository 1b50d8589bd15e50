"""Absorbed multi-head latent attention over a paged latent cache, for a few query tokens per sequence.

All heads share one key of C + R numbers and one value, its first C. So the rows of a program's query tile are heads,
and query tokens if heads are few: the cache is read once per tile. Contexts are split so that one long sequence fills
the chip; a second kernel merges the parts in their order.

Shape letters: B sequences, Q query tokens of a sequence, H heads, N query rows of a tile (token major), S cached tokens
of a tile, C latent (kv_lora_rank), R rope dim, X = C + R, E width of a cache entry, P parts of a context.
Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2; online softmax: FlashAttention-2, FlashDecoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..cache import FP8_CACHE, from_entries
from . import entries, mla_hopper, pdl
from .chips import Chip, check, chip_of, options
from .sizes import cdiv, power_of_2

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_ptr, q_stride_t, q_stride_h, cache_ptr, cache_stride_block, cache_stride_token, table_ptr, table_stride,
    length_ptr, out_ptr, lse_ptr, scale_log2, H, Q, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    INSTRUCTION: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of query rows, parts, sequences. Writes BF16 results, or with parts FP32 ones and their log-sums."""
    b = tl.program_id(2)
    part = tl.program_id(1)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_N = n_N < Q * H
    token_N = (b * Q + n_N // H).to(tl.int64)
    c_C = tl.arange(0, BLOCK_C)
    r_R = tl.arange(0, BLOCK_R)
    table_ptr += b * table_stride
    length = tl.load(length_ptr + b)  # not written by the kernel ahead, nor is the table: see `attend`
    span = tl.cdiv(tl.cdiv(length, BLOCK_S), PARTS) * BLOCK_S
    start = part * span
    end = tl.minimum(start + span, length)
    # A tile's blocks are known one tile ahead, so that nothing waits for the table.
    block = _blocks(table_ptr, start, end, PAGE, BLOCK_S)
    if PDL:
        s_S = start + tl.arange(0, BLOCK_S)
        entry_ptrs_S = _entries(cache_ptr, cache_stride_block, cache_stride_token, block, s_S, PAGE)
        entries.prefetch(entry_ptrs_S, s_S < end, C, R)
    pdl.wait(PDL)
    pdl.release(PDL)
    q_ptrs_N = q_ptr + token_N * q_stride_t + (n_N % H) * q_stride_h
    q_NC = tl.load(q_ptrs_N[:, None] + c_C[None, :], mask=valid_N[:, None] & (c_C < C)[None, :], other=0.0)
    q_NR = tl.load(q_ptrs_N[:, None] + C + r_R[None, :], mask=valid_N[:, None] & (r_R < R)[None, :], other=0.0)
    visible_N = length - (Q - 1 - n_N // H)  # a query token sees the tokens before it and itself

    most_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    acc_NC = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if PREFETCH:
        held_SC, scale_SG, k_SR = _load(
            cache_ptr, cache_stride_block, cache_stride_token, block, start, end, C, R, PAGE, BLOCK_S, BLOCK_C, BLOCK_R
        )
        block = _blocks(table_ptr, start + BLOCK_S, end, PAGE, BLOCK_S)
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        wanted = s + BLOCK_S if PREFETCH else s
        tile = _load(
            cache_ptr, cache_stride_block, cache_stride_token, block, wanted, end, C, R, PAGE, BLOCK_S, BLOCK_C, BLOCK_R
        )
        block = _blocks(table_ptr, wanted + BLOCK_S, end, PAGE, BLOCK_S)
        if not PREFETCH:
            held_SC, scale_SG, k_SR = tile
        s_S = s + tl.arange(0, BLOCK_S)
        k_SC = entries.latents(held_SC, scale_SG, INSTRUCTION)
        score_NS = tl.dot(q_NC, tl.trans(k_SC))
        score_NS = tl.dot(q_NR, tl.trans(k_SR), score_NS) * scale_log2
        score_NS = tl.where(s_S[None, :] < visible_N[:, None], score_NS, float("-inf"))
        most_now_N = tl.maximum(most_N, tl.max(score_NS, 1))
        shift_N = tl.where(most_now_N == float("-inf"), 0.0, most_now_N)  # no token visible yet
        weight_NS = tl.exp2(score_NS - shift_N[:, None])
        shrink_N = tl.exp2(most_N - shift_N)
        sum_N = sum_N * shrink_N + tl.sum(weight_NS, 1)
        acc_NC = tl.dot(weight_NS.to(tl.bfloat16), k_SC, acc_NC * shrink_N[:, None])
        most_N = most_now_N
        if PREFETCH:
            held_SC, scale_SG, k_SR = tile

    acc_NC /= tl.where(sum_N > 0, sum_N, 1.0)[:, None]
    row_N = (token_N * H + n_N % H) * PARTS + part
    tl.store(out_ptr + row_N[:, None] * C + c_C[None, :], acc_NC, mask=valid_N[:, None] & (c_C < C)[None, :])
    if PARTS > 1:
        tl.store(lse_ptr + row_N, most_N + tl.log2(sum_N), mask=valid_N)  # -inf where no token was visible


@triton.jit
def _blocks(table_ptr, s, end, PAGE: tl.constexpr, BLOCK_S: tl.constexpr):
    """The cache blocks of the tokens of a tile, or the one in which it lies. 32 bits: few registers are left."""
    if PAGE % BLOCK_S == 0:
        block = tl.load(table_ptr + s // PAGE, mask=s < end, other=0)
    else:
        s_S = s + tl.arange(0, BLOCK_S)
        block = tl.load(table_ptr + s_S // PAGE, mask=s_S < end, other=0)
    return block


@triton.jit
def _entries(cache_ptr, cache_stride_block, cache_stride_token, block, s_S, PAGE: tl.constexpr):
    """Pointers to the cache entries of a tile's tokens."""
    return cache_ptr + block.to(tl.int64) * cache_stride_block + (s_S % PAGE) * cache_stride_token


@triton.jit
def _load(
    cache_ptr, cache_stride_block, cache_stride_token, block, s, end, C: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Latents as held, their scales and the rope keys of a tile."""
    s_S = s + tl.arange(0, BLOCK_S)
    r_R = tl.arange(0, BLOCK_R)
    token_ptrs_S = _entries(cache_ptr, cache_stride_block, cache_stride_token, block, s_S, PAGE)
    held_SC, scale_SG = entries.load_latents(token_ptrs_S, s_S < end, C, BLOCK_C)
    mask_SR = tl.broadcast_to((s_S < end)[:, None], (BLOCK_S, BLOCK_R))
    if R != BLOCK_R:
        mask_SR &= (r_R < R)[None, :]
    k_SR = tl.load(entries.rope_keys(token_ptrs_S, C)[:, None] + r_R[None, :], mask=mask_SR, other=0.0)
    return held_SC, scale_SG, k_SR


@triton.jit
def merged_row(part_ptr, lse_ptr, row, c_C, C, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """Columns ``c_C`` of a query row's result, from its parts in their order; FP32, or BF16 as the only part is."""
    if PARTS == 1:
        out_C = tl.load(part_ptr + row * C + c_C, mask=c_C < C, other=0.0)
    else:
        p_P = tl.arange(0, PADDED)
        lse_P = tl.load(lse_ptr + row * PARTS + p_P, mask=p_P < PARTS, other=float("-inf"))
        most = tl.max(lse_P, 0)
        weight_P = tl.exp2(lse_P - tl.where(most == float("-inf"), 0.0, most))
        total = tl.sum(weight_P, 0)
        mask_PC = (p_P < PARTS)[:, None] & (c_C < C)[None, :]  # not by what lse says: both loads are on their way
        part_PC = tl.load(part_ptr + (row * PARTS + p_P)[:, None] * C + c_C[None, :], mask=mask_PC, other=0.0)
        part_PC = tl.where((lse_P > float("-inf"))[:, None], part_PC, 0.0)
        out_C = tl.sum(part_PC * weight_P[:, None], 0) * (1.0 / tl.where(total > 0, total, 1.0))
    return out_C


@triton.jit
def _merge(
    part_ptr, lse_ptr, out_ptr, C, PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr
):
    """Grid: query rows, tiles of C."""
    row = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pdl.wait(PDL)
    pdl.release(PDL)
    tl.store(out_ptr + row * C + c_C, merged_row(part_ptr, lse_ptr, row, c_C, C, PARTS, PADDED), mask=c_C < C)


class Config(NamedTuple):
    block_n: int
    block_s: int
    warps: int
    stages: int  # tiles of the cache on their way into shared memory, and the one in use
    prefetch: bool = False  # the next tile waits in registers instead
    has_tasks: bool = False  # the kernel of `mla_hopper`


HOPPER = Config(mla_hopper.TILE, mla_hopper.TILE, 8, 2, has_tasks=True)


# Configurations by chip for contexts so short and few that every tile of tokens is a part.
SHORT = {"sm_90": (Config(16, 64, 8, 1), Config(16, 64, 4, 2))}

# Configurations by chip for up to 16, up to 32, and more query rows; "" is one that fits any chip.
TABLE = {
    "": (Config(16, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    "sm_80": (Config(16, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
    "sm_90": (Config(16, 64, 4, 2), Config(32, 64, 4, 2), Config(64, 64, 8, 2)),
    "sm_100": (Config(16, 32, 4, 2), Config(32, 32, 4, 2), Config(64, 32, 8, 2)),
    "gfx950": (Config(16, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
}
# FP8 tiles are small and go through registers to be decoded; with few rows they may as well wait there.
FP8_TABLE = {
    "sm_80": (Config(16, 32, 8, 1, True), Config(32, 32, 8, 1, True), Config(32, 32, 8, 1, True)),
    "sm_90": (Config(16, 64, 8, 1, True), Config(32, 32, 8, 1, True), Config(64, 64, 8, 2)),
    "sm_100": (Config(16, 32, 8, 1, True), Config(32, 32, 8, 1, True), Config(64, 32, 8, 2)),
}


def choose(
    batch: int, rows: int, longest: int, q_THX: torch.Tensor, cache: torch.Tensor, latent: int, chip: Chip
) -> Config:
    """The configuration for ``rows`` = Q H query rows of each of ``batch`` sequences of up to ``longest`` tokens."""
    fp8 = cache.dtype == FP8_CACHE
    short = None if fp8 else choose_short(batch, rows, longest, chip)
    if short is not None:
        return short
    if rows > 16 and mla_hopper.takes(q_THX, cache, latent, chip):
        return HOPPER
    table = FP8_TABLE if fp8 and chip.name in FP8_TABLE else TABLE
    few, more, many = table.get(chip.name, TABLE[""])
    return few if rows <= 16 else more if rows <= 32 else many


def choose_short(batch: int, rows: int, longest: int, chip: Chip) -> Config | None:
    """The first whose tiles of a few rows and tokens fit the chip at once; None where none does.

    Then time is what one tile takes, however often the cache is read.
    """
    for config in SHORT.get(chip.name, ()):
        if batch * cdiv(rows, config.block_n) * cdiv(longest, config.block_s) <= rooms_for(config, chip):
            return config
    return None


def rooms_for(config: Config, chip: Chip) -> int:
    """Programs that fill the chip once: of 8 warps one to a processor, of 4 two."""
    return chip.processors * (1 if config.warps >= 8 else 2)


def parts_for(batch: int, rows: int, longest: int, config: Config, chip: Chip) -> int:
    """Parts of a context such that programs fill the chip once. None is empty where the context is the longest."""
    programs = batch * cdiv(rows, config.block_n)
    tiles = cdiv(longest, config.block_s)
    most = max(1, min(rooms_for(config, chip) // programs, tiles, 128))
    return cdiv(tiles, cdiv(tiles, most))


class Attended(NamedTuple):
    """Weighted latents of every query, in parts of the context, which `merged` or `values.values` put together."""

    parts: torch.Tensor  # float32 [T, H, P, C], or of one part BF16 [T, H, C]
    lse_THP: torch.Tensor | None  # float32, log2 of the parts' sums; of one part None


def attend(
    q_THX: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    latent: int,
    longest: int,
    parts: int | None = None,
    config: Config | None = None,
) -> Attended:
    """Of absorbed queries [T, H, C + R]; T = B Q, sequence by sequence.

    ``cache`` [blocks, block_size, E], BF16 or FP8; ``table`` int32 [B, ...], a sequence's blocks in order, anything
    after them; ``lengths`` int32 [B] counts the query tokens too, and is 0 for a row of padding, whose result is 0.
    ``longest`` is a bound on the lengths that is known before they are. The kernel directly ahead may write queries and
    cache, but neither ``table`` nor ``lengths``: they are read while it runs.
    """
    name = "mla_decode"
    tokens, heads, width = q_THX.shape
    batch = len(lengths)
    rope = width - latent
    check(tokens % batch == 0, f"{tokens} query tokens of {batch} sequences", name)
    entries.check_cache(cache, latent, rope, name)
    check(q_THX.dtype == torch.bfloat16, f"queries in {q_THX.dtype}", name)
    check(q_THX.stride(2) == 1 and table.stride(1) == 1, "rows must be contiguous", name)
    check(table.dtype == torch.int32 and lengths.dtype == torch.int32, "tables and lengths must be int32", name)
    check(table.shape[0] == batch and lengths.is_contiguous(), f"table {tuple(table.shape)}", name)
    chip = chip_of(q_THX.device)
    queries = tokens // batch
    rows = queries * heads
    config = config or choose(batch, rows, longest, q_THX, cache, latent, chip)
    parts = parts or parts_for(batch, rows, longest, config, chip)
    if parts == 1:
        out = Attended(q_THX.new_empty(tokens, heads, latent), None)
    else:
        room = q_THX.new_empty(tokens, heads, parts, latent, dtype=torch.float32)
        out = Attended(room, q_THX.new_empty(tokens, heads, parts, dtype=torch.float32))
    if config.has_tasks:
        mla_hopper.launch(q_THX, cache, table, lengths, scale * LOG2_E, *out, chip)
        return out
    _attend[(cdiv(rows, config.block_n), parts, batch)](
        q_THX, q_THX.stride(0), q_THX.stride(1), cache, cache.stride(0), cache.stride(1), table, table.stride(0),
        lengths, *out, scale * LOG2_E, heads, queries, latent, rope, PAGE=cache.shape[1], PARTS=parts,
        BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=max(16, power_of_2(latent)),
        BLOCK_R=max(16, power_of_2(rope)), INSTRUCTION=chip.decodes_fp8, PREFETCH=config.prefetch,
        STAGES=config.stages, PDL=chip.dependent_launch, **options(chip, config.warps, config.stages),
    )  # fmt: skip
    return out


def merged(attended: Attended) -> torch.Tensor:
    """BF16 [T, H, C]."""
    part_THPC, lse_THP = attended
    if lse_THP is None:
        return part_THPC
    tokens, heads, parts, latent = part_THPC.shape
    chip = chip_of(part_THPC.device)
    out = torch.empty(tokens, heads, latent, dtype=torch.bfloat16, device=part_THPC.device)
    tile_c = min(max(16, power_of_2(latent)), 256)
    _merge[(tokens * heads, cdiv(latent, tile_c))](
        part_THPC, lse_THP, out, latent, PARTS=parts, PADDED=power_of_2(parts), BLOCK_C=tile_c,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out


def attend_eager(
    q_THX: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scale: float, latent: int
) -> torch.Tensor:
    """The twin of `merged` results of `attend`, FP32 [T, H, C]."""
    page = cache.shape[1]
    queries = len(q_THX) // len(lengths)
    out = q_THX.new_zeros(*q_THX.shape[:2], latent, dtype=torch.float32)
    for b, length in enumerate(lengths.tolist()):
        blocks = table[b, : cdiv(length, page)].long()
        values_SX = from_entries(cache[blocks].flatten(0, 1)[:length], latent, torch.float32)
        for q in range(queries):
            seen_SX = values_SX[: max(0, length - (queries - 1 - q))]
            if len(seen_SX):
                weights_HS = torch.softmax(q_THX[b * queries + q].float() @ seen_SX.t() * scale, -1)
                out[b * queries + q] = weights_HS @ seen_SX[:, :latent]
    return out
