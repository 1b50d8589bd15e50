"""`prompt_attention` on Hopper for DeepSeek's head sizes: its warps have different tasks.

One warp has queries, keys and values copied ahead. Two groups of four warps have half of a tile's queries each; a group
starts the scores of the next tile of keys before the values of this one, and weighs the former while the matrix units
are at the latter. Weights stay in registers. Programs stay and walk all tiles, so that copying goes on while results
are written.

Shape letters: Q = 64 queries of a group, K = 128 keys of a tile, V = 128 columns of the values, U tiles of queries, G
heads whose tiles run side by side.
Source: FlashAttention-3 (arXiv 2407.08608) section 3.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper, pdl
from .chips import Chip, options

QUERIES = 64  # of a group
KEYS = 128
NOPE = 128
ROPE = 64
VALUE = 128
STAGES = 2  # tiles of keys, and of values: 80 KiB beside the queries' 48
HEADS_TOGETHER = 2
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)  # rows of 128 bytes, swizzled as the matrix units read them
_QUERIES = gl.constexpr(QUERIES)
_KEYS = gl.constexpr(KEYS)
_NOPE = gl.constexpr(NOPE)
_ROPE = gl.constexpr(ROPE)
_VALUE = gl.constexpr(VALUE)
_STAGES = gl.constexpr(STAGES)
_SHARED = gl.constexpr(_LAYOUT)
_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of scores and of results
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), 2))


@gluon.jit
def _turns(U, H):
    """How often a program takes a tile and a head, or none."""
    return 2 * gl.cdiv(gl.cdiv(U, 2) * H, gl.num_programs(0))


@gluon.jit
def _item(turn, U, H, G):
    """A program's tile and head in a turn, and whether there is one.

    Turns come in twos, a long tile and a short one, so that all programs have as much to do; heads in groups of G,
    whose keys and values the L2 cache holds.
    """
    i = turn // 2 * gl.num_programs(0) + gl.program_id(0)
    twos = gl.cdiv(U, 2)
    u = i % (twos * G) // G
    there = (i < twos * H) & ((turn % 2 == 0) | (2 * u + 1 != U))
    return gl.where(turn % 2 == 0, u, U - 1 - u), i // (twos * G) * G + i % G, there


@gluon.jit
def _copy_ahead(buffers, barriers, q_desc, kv_desc, rope_desc, tile_ptr, U, H, G):
    q, q_rope, k, k_rope, v = buffers
    q_filled, q_emptied, k_filled, k_emptied, v_filled, v_emptied = barriers
    count = 0
    q_phase = 1
    for turn in range(_turns(U, H)):
        u, h, there = _item(turn, U, H, G)
        if there:
            row = gl.load(tile_ptr + u * 4)
            start = gl.load(tile_ptr + u * 4 + 2)
            end = start + gl.load(tile_ptr + u * 4 + 3) + gl.load(tile_ptr + u * 4 + 1)
            q_column, kv_column = h * (_NOPE + _ROPE), h * (_NOPE + _VALUE)
            for s in range(start, end, _KEYS):
                stage, phase = count % _STAGES, (count // _STAGES & 1) ^ 1
                ready = k_filled.index(stage)
                mbarrier.wait(k_emptied.index(stage), phase)
                mbarrier.expect(ready, _KEYS * (_NOPE + _ROPE) * 2)
                hopper.copy_tile(kv_desc, [s, kv_column], ready, k.index(stage))
                hopper.copy_tile(rope_desc, [s, 0], ready, k_rope.index(stage))
                if s == start:
                    for group in gl.static_range(2):
                        at = row + group * _QUERIES  # past a tile's queries are others', or zeros: not stored
                        ready = q_filled.index(group)
                        mbarrier.wait(q_emptied.index(group), q_phase)
                        mbarrier.expect(ready, _QUERIES * (_NOPE + _ROPE) * 2)
                        hopper.copy_tile(q_desc[0], [at, q_column], ready, q.index(group))
                        hopper.copy_tile(q_desc[1], [at, q_column + _NOPE], ready, q_rope.index(group))
                ready = v_filled.index(stage)
                mbarrier.wait(v_emptied.index(stage), phase)
                mbarrier.expect(ready, _KEYS * _VALUE * 2)
                hopper.copy_tile(kv_desc, [s, kv_column + _NOPE], ready, v.index(stage))
                count += 1
            q_phase ^= 1


@gluon.jit
def _score(q, q_rope, k, k_rope):
    """Start [Q, K] products of queries and keys."""
    zero_QK = gl.zeros([_QUERIES, _KEYS], gl.float32, layout=_PRODUCT)
    started = warpgroup_mma(q, k.permute((1, 0)), zero_QK, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, k_rope.permute((1, 0)), started, is_async=True)


@gluon.jit
def _weigh(score_QK, most_Q, sum_Q, seen_Q, scale_log2, MASKED: gl.constexpr):
    """Weights, the factor for those before, the largest score and the sum of weights. ``seen_Q``: keys of the tile."""
    if MASKED:
        k_K = gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _PRODUCT))
        score_QK = gl.where(k_K[None, :] < seen_Q[:, None], score_QK, float("-inf"))
    now_Q = gl.maximum(most_Q, gl.max(score_QK, 1) * scale_log2)
    weight_QK = gl.exp2(score_QK * scale_log2 - now_Q[:, None])
    shrink_Q = gl.exp2(most_Q - now_Q)
    return weight_QK, shrink_Q, now_Q, sum_Q * shrink_Q + gl.sum(weight_QK, 1)


@gluon.jit
def _step(
    buffers, barriers, count, weight_QK, acc_QV, most_Q, sum_Q, seen_Q, scale_log2, MASKED: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    """Scores and weights of tile ``count``, values of the one before."""
    q, q_rope, k, k_rope, v = buffers
    _, _, k_filled, k_emptied, v_filled, v_emptied = barriers
    stage, before = count % _STAGES, (count - 1) % _STAGES
    weight_QK = gl.convert_layout(weight_QK.to(gl.bfloat16), _WEIGHTS)
    mbarrier.wait(k_filled.index(stage), count // _STAGES & 1)
    zero = hopper.unknown_zero()
    scored = _score(q.index(OWN + zero), q_rope.index(OWN + zero), k.index(stage + zero), k_rope.index(stage + zero))
    mbarrier.wait(v_filled.index(before), (count - 1) // _STAGES & 1)
    summed = warpgroup_mma(weight_QK, v.index(before), acc_QV, is_async=True)
    score_QK = warpgroup_mma_wait(1, deps=(scored,))
    mbarrier.arrive(k_emptied.index(stage), count=1)
    next_QK, shrink_Q, most_Q, sum_Q = _weigh(score_QK, most_Q, sum_Q, seen_Q, scale_log2, MASKED)
    acc_QV, _ = warpgroup_mma_wait(0, deps=(summed, weight_QK))
    mbarrier.arrive(v_emptied.index(before), count=1)
    return next_QK, acc_QV * shrink_Q[:, None], most_Q, sum_Q


@gluon.jit
def _attend(buffers, barriers, given, scale_log2, OWN: gl.constexpr):
    """Queries of half OWN of every tile. A half without queries of its own only lets the buffers go."""
    q, q_rope, k, k_rope, v = buffers
    q_filled, q_emptied, k_filled, k_emptied, v_filled, v_emptied = barriers
    tile_ptr, out_ptr, U, H, G = given
    count = 0
    q_phase = 0
    q_Q = gl.arange(0, _QUERIES, layout=gl.SliceLayout(1, _PRODUCT))
    v_V = gl.arange(0, _VALUE, layout=gl.SliceLayout(0, _PRODUCT))
    for turn in range(_turns(U, H)):
        u, h, there = _item(turn, U, H, G)
        if there:
            row = gl.load(tile_ptr + u * 4) + OWN * _QUERIES
            queries = gl.load(tile_ptr + u * 4 + 1)
            position = gl.load(tile_ptr + u * 4 + 3)
            end = position + queries
            after = count + gl.cdiv(end, _KEYS)
            position += OWN * _QUERIES
            queries -= OWN * _QUERIES
            mbarrier.wait(q_filled.index(OWN), q_phase)
            if queries > 0:
                base = count
                whole = count + (position + 1) // _KEYS  # tiles before it are seen by all queries
                used = count + gl.cdiv(position + gl.minimum(queries, _QUERIES), _KEYS)
                seen_Q = position + 1 + q_Q
                most_Q = gl.full([_QUERIES], float("-inf"), gl.float32, layout=gl.SliceLayout(1, _PRODUCT))
                sum_Q = gl.zeros([_QUERIES], gl.float32, layout=gl.SliceLayout(1, _PRODUCT))
                acc_QV = gl.zeros([_QUERIES, _VALUE], gl.float32, layout=_PRODUCT)
                stage = count % _STAGES
                mbarrier.wait(k_filled.index(stage), count // _STAGES & 1)
                zero = hopper.unknown_zero()
                scored = _score(
                    q.index(OWN + zero), q_rope.index(OWN + zero), k.index(stage + zero), k_rope.index(stage + zero)
                )
                score_QK = warpgroup_mma_wait(0, deps=(scored,))
                mbarrier.arrive(k_emptied.index(stage), count=1)
                weight_QK, _, most_Q, sum_Q = _weigh(score_QK, most_Q, sum_Q, seen_Q, scale_log2, True)
                for tile in range(count + 1, whole):
                    weight_QK, acc_QV, most_Q, sum_Q = _step(
                        buffers, barriers, tile, weight_QK, acc_QV, most_Q, sum_Q, seen_Q, scale_log2, False, OWN
                    )
                for tile in range(gl.maximum(count + 1, whole), used):
                    weight_QK, acc_QV, most_Q, sum_Q = _step(
                        buffers, barriers, tile, weight_QK, acc_QV, most_Q, sum_Q, seen_Q - (tile - base) * _KEYS,
                        scale_log2, True, OWN,
                    )  # fmt: skip
                mbarrier.arrive(q_emptied.index(OWN), count=1)
                last = used - 1
                stage = last % _STAGES
                mbarrier.wait(v_filled.index(stage), last // _STAGES & 1)
                beyond = end - (last - base) * _KEYS
                if beyond < _KEYS:
                    hopper.wipe(v.index(stage), beyond, _KEYS)
                    fence_async_shared()
                last_QK = gl.convert_layout(weight_QK.to(gl.bfloat16), _WEIGHTS)
                summed = warpgroup_mma(last_QK, v.index(stage), acc_QV, is_async=True)
                acc_QV, _ = warpgroup_mma_wait(0, deps=(summed, last_QK))
                mbarrier.arrive(v_emptied.index(stage), count=1)
                out_QV = (acc_QV * (1.0 / sum_Q)[:, None]).to(gl.bfloat16)
                out_ptrs_Q = out_ptr + ((row + q_Q).to(gl.int64) * H + h) * _VALUE
                gl.store(out_ptrs_Q[:, None] + v_V[None, :], out_QV, mask=(q_Q < queries)[:, None])
                count = used
            else:
                mbarrier.arrive(q_emptied.index(OWN), count=1)
            for tile in range(count, after):
                stage, phase = tile % _STAGES, tile // _STAGES & 1
                mbarrier.wait(k_filled.index(stage), phase)
                mbarrier.arrive(k_emptied.index(stage), count=1)
                mbarrier.wait(v_filled.index(stage), phase)
                mbarrier.arrive(v_emptied.index(stage), count=1)
            count = after
            q_phase ^= 1


@gluon.jit(do_not_specialize=["U", "H", "G"])
def _prompt_hopper(q_desc, q_rope_desc, kv_desc, rope_desc, tile_ptr, out_ptr, scale_log2, U, H, G, PDL: gl.constexpr):
    """Grid: as many programs as stay on the chip at a time."""
    q = gl.allocate_shared_memory(gl.bfloat16, [2, _QUERIES, _NOPE], _SHARED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [2, _QUERIES, _ROPE], _SHARED)
    k = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _NOPE], _SHARED)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _ROPE], _SHARED)
    v = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _VALUE], _SHARED)
    q_filled = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_emptied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_filled = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    k_emptied = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_filled = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_emptied = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_filled.index(i), count=1)
        mbarrier.init(q_emptied.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_filled.index(i), count=1)
        mbarrier.init(k_emptied.index(i), count=2)
        mbarrier.init(v_filled.index(i), count=1)
        mbarrier.init(v_emptied.index(i), count=2)
    fence_async_shared()
    pdl.wait(PDL)  # the other warps start after it
    pdl.release(PDL)
    buffers = q, q_rope, k, k_rope, v
    barriers = q_filled, q_emptied, k_filled, k_emptied, v_filled, v_emptied
    given = tile_ptr, out_ptr, U, H, G
    gl.warp_specialize(
        [
            (_attend, (buffers, barriers, given, scale_log2, 0)),
            (_attend, (buffers, barriers, given, scale_log2, 1)),
            (_copy_ahead, (buffers, barriers, (q_desc, q_rope_desc), kv_desc, rope_desc, tile_ptr, U, H, G)),
        ],
        [4, 1],
        [232, 40],  # registers a thread
    )


def takes(q_THX: torch.Tensor, kv_SHY: torch.Tensor, rope_SR: torch.Tensor, chip: Chip) -> bool:
    """Whether this is the chip, and these are DeepSeek's sizes, in rows that copies can take."""
    sizes = q_THX.shape[2] == NOPE + ROPE and rope_SR.shape[1] == ROPE and kv_SHY.shape[2] == NOPE + VALUE
    heads_follow = q_THX.stride(1) == NOPE + ROPE and kv_SHY.stride(1) == NOPE + VALUE
    aligned = all(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (q_THX, kv_SHY, rope_SR))
    return hopper.runs_tasks(chip) and sizes and heads_follow and aligned


def launch(
    q_THX: torch.Tensor,
    kv_SHY: torch.Tensor,
    rope_SR: torch.Tensor,
    tiles_U: torch.Tensor,
    out_THV: torch.Tensor,
    scale_log2: float,
    chip: Chip,
) -> None:
    """Fill ``out_THV`` as `prompt_attention.prompt_attention` does, which checks the rest."""
    tiles, heads = len(tiles_U), q_THX.shape[1]
    _prompt_hopper[(min(chip.processors, tiles * heads),)](
        _rows(q_THX, [QUERIES, NOPE]), _rows(q_THX, [QUERIES, ROPE]), _rows(kv_SHY, [KEYS, NOPE]),
        _rows(rope_SR, [KEYS, ROPE]), tiles_U, out_THV, scale_log2, tiles, heads, math.gcd(heads, HEADS_TOGETHER),
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip


def _rows(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Of which ``block`` is copied; heads are parts of a row."""
    return TensorDescriptor(x, [len(x), x[0].numel()], [x.stride(0), 1], block, _LAYOUT)
