"""Causal attention of prompts in the expanded form: every head with its own keys and values, many sequences a launch.

A query sees the cached positions of its sequence before the prompt, those of the prompt before it, and itself. Keys are
[k_nope | k_rope], of which all heads share k_rope; they are never put together.

Shape letters: T tokens of the step, S positions of all sequences together, H heads, N nope dim, R rope dim, V value
dim, Q queries of a tile, K keys of a tile, U tiles.
Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; online softmax: FlashAttention-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, prompt_hopper
from .chips import Chip, check, chip_of, options
from .sizes import power_of_2

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries of one sequence that a program answers; a row of the launch's int32 [U, 4]."""

    row: int  # of the first query, in the step
    queries: int  # at most `TILE_QUERIES`
    start: int  # row of the sequence's first position, among the S
    position: int  # of the first query, in its sequence


TILE_QUERIES = 128


@triton.jit
def _prompt_attention(
    q_ptr, q_stride_t, q_stride_h, kv_ptr, kv_stride_s, kv_stride_h, rope_ptr, rope_stride, tile_ptr,
    out_ptr, scale_log2, H, N, R, V, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, heads."""
    pdl.wait(PDL)
    pdl.release(PDL)
    tile_ptr += tl.program_id(0) * 4
    row = tl.load(tile_ptr)
    count = tl.load(tile_ptr + 1)
    start = tl.load(tile_ptr + 2).to(tl.int64)
    position = tl.load(tile_ptr + 3)
    h = tl.program_id(1)
    q_Q = tl.arange(0, BLOCK_Q)
    valid_Q = q_Q < count
    n_N = tl.arange(0, BLOCK_N)
    r_R = tl.arange(0, BLOCK_R)
    v_V = tl.arange(0, BLOCK_V)
    token_Q = (row + q_Q).to(tl.int64)
    q_ptrs_Q = q_ptr + token_Q * q_stride_t + h * q_stride_h
    q_QN = tl.load(q_ptrs_Q[:, None] + n_N[None, :], mask=valid_Q[:, None] & (n_N < N)[None, :], other=0.0)
    q_QR = tl.load(q_ptrs_Q[:, None] + N + r_R[None, :], mask=valid_Q[:, None] & (r_R < R)[None, :], other=0.0)
    kv_ptr += start * kv_stride_s + h * kv_stride_h
    rope_ptr += start * rope_stride

    most_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    sum_Q = tl.zeros((BLOCK_Q,), tl.float32)
    acc_QV = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    whole = (position + 1) // BLOCK_K * BLOCK_K  # keys before it are seen by all queries
    end = position + count
    for s in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        most_Q, sum_Q, acc_QV = _attend(
            q_QN, q_QR, kv_ptr, kv_stride_s, rope_ptr, rope_stride, s, end, position + q_Q, scale_log2, most_Q, sum_Q,
            acc_QV, n_N, r_R, v_V, N, R, V, BLOCK_K, EVEN, False,
        )  # fmt: skip
    for s in tl.range(whole, end, BLOCK_K, num_stages=STAGES):
        most_Q, sum_Q, acc_QV = _attend(
            q_QN, q_QR, kv_ptr, kv_stride_s, rope_ptr, rope_stride, s, end, position + q_Q, scale_log2, most_Q, sum_Q,
            acc_QV, n_N, r_R, v_V, N, R, V, BLOCK_K, EVEN, True,
        )  # fmt: skip
    out_ptrs_QV = out_ptr + ((token_Q * H + h) * V)[:, None] + v_V[None, :]
    tl.store(out_ptrs_QV, acc_QV / sum_Q[:, None], mask=valid_Q[:, None] & (v_V < V)[None, :])


@triton.jit
def _attend(
    q_QN, q_QR, kv_ptr, kv_stride, rope_ptr, rope_stride, s, end, position_Q, scale_log2, most_Q, sum_Q, acc_QV,
    n_N, r_R, v_V, N, R, V, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys more."""
    s_K = s + tl.arange(0, BLOCK_K)
    row_K = tl.minimum(s_K, end - 1) if MASKED else s_K
    kv_ptrs_K = kv_ptr + row_K.to(tl.int64) * kv_stride
    k_ptrs_KN = kv_ptrs_K[:, None] + n_N[None, :]
    r_ptrs_KR = rope_ptr + (row_K.to(tl.int64) * rope_stride)[:, None] + r_R[None, :]
    v_ptrs_KV = kv_ptrs_K[:, None] + N + v_V[None, :]
    if EVEN:
        k_KN, k_KR, v_KV = tl.load(k_ptrs_KN), tl.load(r_ptrs_KR), tl.load(v_ptrs_KV)
    else:
        k_KN = tl.load(k_ptrs_KN, mask=tl.broadcast_to((n_N < N)[None, :], k_ptrs_KN.shape), other=0.0)
        k_KR = tl.load(r_ptrs_KR, mask=tl.broadcast_to((r_R < R)[None, :], r_ptrs_KR.shape), other=0.0)
        v_KV = tl.load(v_ptrs_KV, mask=tl.broadcast_to((v_V < V)[None, :], v_ptrs_KV.shape), other=0.0)
    score_QK = tl.dot(q_QR, tl.trans(k_KR), tl.dot(q_QN, tl.trans(k_KN))) * scale_log2
    if MASKED:
        score_QK = tl.where(s_K[None, :] <= position_Q[:, None], score_QK, float("-inf"))
    now_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
    weight_QK = tl.exp2(score_QK - now_Q[:, None])
    shrink_Q = tl.exp2(most_Q - now_Q)
    sum_Q = sum_Q * shrink_Q + tl.sum(weight_QK, 1)
    acc_QV = tl.dot(weight_QK.to(tl.bfloat16), v_KV, acc_QV * shrink_Q[:, None])
    return now_Q, sum_Q, acc_QV


class Config(NamedTuple):
    block_k: int
    warps: int
    stages: int
    has_tasks: bool = False  # the kernel of `prompt_hopper`


HOPPER = Config(prompt_hopper.KEYS, 8, prompt_hopper.STAGES, has_tasks=True)
HOPPER_WORK = 2048  # tiles times heads: with less, its launch costs the host more than it saves


def choose(q_THX: torch.Tensor, kv_SHY: torch.Tensor, rope_SR: torch.Tensor, tiles: int, chip: Chip) -> Config:
    if tiles * q_THX.shape[1] >= HOPPER_WORK and prompt_hopper.takes(q_THX, kv_SHY, rope_SR, chip):
        return HOPPER
    return plain(chip)


def plain(chip: Chip) -> Config:
    if chip.shared_memory < 160 << 10:
        return Config(32, 8, 1)
    return Config(64, 8, 3 if chip.shared_memory >= 200 << 10 else 2)


def prompt_attention(
    q_THX: torch.Tensor,
    kv_SHY: torch.Tensor,
    rope_SR: torch.Tensor,
    tiles_U: torch.Tensor,
    out_THV: torch.Tensor,
    scale: float,
    config: Config | None = None,
) -> None:
    """Write into ``out_THV`` the results of the queries that tiles name.

    ``q_THX`` BF16 [T, H, N + R], rotated; ``kv_SHY`` BF16 [S, H, N + V], keys without their rotated part and values;
    ``rope_SR`` BF16, rotated keys; ``tiles_U`` int32 [U, 4], rows of `Tile`, those with the most keys first;
    ``out_THV`` BF16, contiguous.
    """
    name = "prompt_attention"
    heads, width = q_THX.shape[1:]
    rope, value = rope_SR.shape[1], out_THV.shape[2]
    nope = width - rope
    check(kv_SHY.shape[1:] == (heads, nope + value), f"keys and values {tuple(kv_SHY.shape)}", name)
    check(len(rope_SR) == len(kv_SHY), f"{len(rope_SR)} rotated keys for {len(kv_SHY)} positions", name)
    contiguous = all(x.stride(-1) == 1 for x in (q_THX, kv_SHY, rope_SR)) and tiles_U.is_contiguous()
    check(contiguous and out_THV.is_contiguous(), "rows must be contiguous", name)
    bf16 = all(x.dtype == torch.bfloat16 for x in (q_THX, kv_SHY, rope_SR, out_THV))
    check(bf16 and tiles_U.dtype == torch.int32, "queries, keys and values must be BF16, tiles int32", name)
    check(out_THV.shape[:2] == q_THX.shape[:2], f"room for {tuple(out_THV.shape)}", name)
    chip = chip_of(q_THX.device)
    config = config or choose(q_THX, kv_SHY, rope_SR, len(tiles_U), chip)
    if config.has_tasks:
        prompt_hopper.launch(q_THX, kv_SHY, rope_SR, tiles_U, out_THV, scale * LOG2_E, chip)
        return
    blocks = [max(16, power_of_2(size)) for size in (nope, rope, value)]
    _prompt_attention[(len(tiles_U), heads)](
        q_THX, *q_THX.stride()[:2], kv_SHY, *kv_SHY.stride()[:2], rope_SR, rope_SR.stride(0), tiles_U, out_THV,
        scale * LOG2_E, heads, nope, rope, value, BLOCK_Q=TILE_QUERIES, BLOCK_K=config.block_k, BLOCK_N=blocks[0],
        BLOCK_R=blocks[1], BLOCK_V=blocks[2], EVEN=blocks == [nope, rope, value], STAGES=config.stages,
        PDL=chip.dependent_launch, **options(chip, config.warps, config.stages),
    )  # fmt: skip


def prompt_attention_eager(
    q_THX: torch.Tensor,
    kv_SHY: torch.Tensor,
    rope_SR: torch.Tensor,
    tiles_U: torch.Tensor,
    out_THV: torch.Tensor,
    scale: float,
) -> None:
    """The twin of `prompt_attention`."""
    rope, value = rope_SR.shape[1], out_THV.shape[2]
    nope = q_THX.shape[2] - rope
    for row, count, start, position in tiles_U.tolist():
        seen = slice(start, start + position + count)
        k_SHN, v_SHV = kv_SHY[seen].float().split([nope, value], dim=2)
        q_QHN, q_QHR = q_THX[row : row + count].float().split([nope, rope], dim=2)
        score_HQS = torch.einsum("qhn,shn->hqs", q_QHN, k_SHN)
        score_HQS += torch.einsum("qhr,sr->hqs", q_QHR, rope_SR[seen].float())
        hidden_QS = torch.ones(score_HQS.shape[1:], dtype=torch.bool, device=q_THX.device).triu(position + 1)
        weight_HQS = (score_HQS * scale).masked_fill(hidden_QS, float("-inf")).softmax(-1)
        out_THV[row : row + count] = torch.einsum("hqs,shv->qhv", weight_HQS, v_SHV).to(out_THV.dtype)
