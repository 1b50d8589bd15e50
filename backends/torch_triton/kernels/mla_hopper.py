"""`mla_decode.attend` on Hopper for many query rows: its warps have different tasks.

One warp has halves of tiles of the cache copied ahead. Two groups of four warps take turns in tiles: group w scores the
tiles of parity w with all their 576 numbers, and owns half w of the value's columns, to which both groups' weights
apply. So nothing is scored twice, and results, too many for the registers of one group, stay in those of two.

Within a pair of tiles group 0 subtracts the largest score up to its own tile, group 1 that up to both, and group 0 then
catches up: one group multiplies while the other takes exponentials. A group's own weights stay in its registers; for
the other group they travel through the shared memory of the tile's rope keys, which scores no longer need. A half is
copied anew as soon as its one reader of values is done.

Shape letters as in `mla_decode`; N = 64 query rows of a tile, S = 64 cached tokens of a tile, J = 256 columns of C.
Source: FlashMLA, docs/20250422-new-kernel-deep-dive.md (the order in which the groups take turns).
"""

from __future__ import annotations

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
from .sizes import cdiv, power_of_2

TILE = 64  # query rows, and cached tokens
LATENT = 512
ROPE = 64
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)  # rows of 128 bytes, swizzled as the matrix units read them
_TILE = gl.constexpr(TILE)
_HALF = gl.constexpr(LATENT // 2)
_LATENT = gl.constexpr(LATENT)
_ROPE = gl.constexpr(ROPE)
_HALF_BYTES = gl.constexpr(TILE * (LATENT // 2) * 2)
_ROPE_BYTES = gl.constexpr(TILE * ROPE * 2)
_SHARED = gl.constexpr(_LAYOUT)
_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
_LINE = gl.constexpr(64)  # numbers of 128 bytes
_TILE_LINES = gl.constexpr(power_of_2(TILE * (LATENT + ROPE) // 64))
_LINES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16]))
_RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT // 2, 16]))
_WEIGHT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT // 2, 16]), 2))


@gluon.jit
def _part(length_ptr, PARTS: gl.constexpr):
    """First token of this program's part of the context, the end of it, and the context's length."""
    length = gl.load(length_ptr + gl.program_id(2))
    span = gl.cdiv(gl.cdiv(length, _TILE), PARTS) * _TILE
    start = gl.program_id(1) * span
    return start, gl.minimum(start + span, length), length


@gluon.jit
def _prefetch(k_ptr, table_ptr, table_stride, start, end, PAGE: gl.constexpr):
    """Bring the part's first pair of tiles to the L2 cache. By four warps."""
    WIDTH: gl.constexpr = _LATENT + _ROPE
    e_E = _LINE * gl.arange(0, _TILE_LINES, layout=_LINES)
    table_ptr += gl.program_id(2) * table_stride
    for i in gl.static_range(2):
        first = start + i * _TILE
        block = gl.load(table_ptr + first // PAGE, mask=first < end, other=0)
        tile_ptr = k_ptr + (block.to(gl.int64) * PAGE + first % PAGE) * WIDTH
        pdl.prefetch(tile_ptr + e_E, e_E < gl.minimum(end - first, _TILE) * WIDTH)


@gluon.jit
def _copy_half(buffers, barriers, descriptors, token, phase, TILE: gl.constexpr, HALF: gl.constexpr):
    """The rope keys come with the half that the other group owns: it reads weights from their place."""
    _, _, k, k_rope, _ = buffers
    _, filled, emptied, _, _, _ = barriers
    _, _, k_desc, k_rope_desc = descriptors
    ready = filled.index(2 * TILE + HALF)
    mbarrier.wait(emptied.index(2 * TILE + HALF), phase)
    mbarrier.expect(ready, _HALF_BYTES if TILE == HALF else _HALF_BYTES + _ROPE_BYTES)
    hopper.copy_tile(k_desc, [token, HALF * _HALF], ready, k.index(2 * TILE + HALF))
    if TILE != HALF:
        hopper.copy_tile(k_rope_desc, [token, _LATENT], ready, k_rope.index(TILE))


@gluon.jit
def _copy_ahead(buffers, barriers, descriptors, part, table_ptr, table_stride, QH, PAGE: gl.constexpr):
    q, q_rope, _, _, _ = buffers
    q_filled, _, _, _, _, _ = barriers
    q_desc, q_rope_desc, _, _ = descriptors
    start, end, _ = part
    row = gl.program_id(2) * QH + gl.program_id(0) * _TILE  # past a sequence's rows are others', or zeros: not stored
    mbarrier.expect(q_filled, 2 * _HALF_BYTES + _ROPE_BYTES)
    hopper.copy_tile(q_desc, [row, 0], q_filled, q.index(0))
    hopper.copy_tile(q_desc, [row, _HALF], q_filled, q.index(1))
    hopper.copy_tile(q_rope_desc, [row, _LATENT], q_filled, q_rope.index(0))
    table_ptr += gl.program_id(2) * table_stride
    phase = 1
    for first in range(start, end, 2 * _TILE):
        both = first + _TILE < end
        second = gl.minimum(first + _TILE, end - 1)  # its block is read early even if there is none
        token_0 = gl.load(table_ptr + first // PAGE) * PAGE + first % PAGE
        token_1 = gl.load(table_ptr + second // PAGE) * PAGE + second % PAGE
        _copy_half(buffers, barriers, descriptors, token_0, phase, 0, 0)
        if both:
            _copy_half(buffers, barriers, descriptors, token_1, phase, 1, 1)
        _copy_half(buffers, barriers, descriptors, token_0, phase, 0, 1)
        if both:
            _copy_half(buffers, barriers, descriptors, token_1, phase, 1, 0)
        phase ^= 1


@gluon.jit
def _finish(
    buffers, barriers, out_ptr, lse_ptr, H, Q, acc_NJ, most_N, sum_N, phase, PARTS: gl.constexpr, OWN: gl.constexpr
):
    """Divide by the sum of both groups' weights, and write the columns of half OWN."""
    OTHER: gl.constexpr = 1 - OWN
    _, _, _, _, exchange = buffers
    _, _, _, most_known, _, sum_known = barriers
    # The other group may still be reading the last maximum.
    mbarrier.arrive(most_known.index(OWN), count=1)
    mbarrier.wait(most_known.index(OTHER), phase)
    exchange.index(OWN).store(sum_N)
    mbarrier.arrive(sum_known.index(OWN), count=1)
    mbarrier.wait(sum_known.index(OTHER), 0)
    sum_N += exchange.index(OTHER).load(gl.SliceLayout(1, _SCORE))
    factor_N = 1.0 / gl.where(sum_N > 0, sum_N, 1.0)
    acc_NJ *= gl.convert_layout(factor_N, gl.SliceLayout(1, _RESULT))[:, None]
    row_N = gl.program_id(0) * _TILE + gl.arange(0, _TILE, layout=gl.SliceLayout(1, _RESULT))
    j_J = OWN * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _RESULT))
    QH = Q * H
    first_row = gl.program_id(2).to(gl.int64) * QH
    out_ptrs_N = out_ptr + ((first_row + row_N) * PARTS + gl.program_id(1)) * _LATENT
    out_NJ = acc_NJ.to(out_ptr.dtype.element_ty)
    gl.store(out_ptrs_N[:, None] + j_J[None, :], out_NJ, mask=(row_N < QH)[:, None])
    if PARTS > 1 and OWN == 0:
        n_N = gl.program_id(0) * _TILE + gl.arange(0, _TILE, layout=gl.SliceLayout(1, _SCORE))
        lse_ptrs_N = lse_ptr + (first_row + n_N) * PARTS + gl.program_id(1)
        gl.store(lse_ptrs_N, most_N + gl.log2(sum_N), mask=n_N < QH)  # -inf where no token was visible


@gluon.jit
def _attend(buffers, barriers, part, out_ptr, lse_ptr, scale_log2, H, Q, PARTS: gl.constexpr, OWN: gl.constexpr):
    """Scores of the tiles of parity OWN; results of the columns of half OWN."""
    OTHER: gl.constexpr = 1 - OWN
    NEAR: gl.constexpr = 2 * OWN + OWN  # of the own tile the own half,
    FAR: gl.constexpr = 2 * OWN + OTHER  # and the other
    THEIRS: gl.constexpr = 2 * OTHER + OWN  # the own half of the other group's tile
    q, q_rope, k, k_rope, exchange = buffers
    q_filled, filled, emptied, most_known, weighed, _ = barriers
    start, end, length = part
    n_N = gl.program_id(0) * _TILE + gl.arange(0, _TILE, layout=gl.SliceLayout(1, _SCORE))
    visible_N = length - (Q - 1 - n_N // H)  # a query token sees the tokens before it and itself
    s_S = gl.arange(0, _TILE, layout=gl.SliceLayout(0, _SCORE))
    most_N = gl.full([_TILE], float("-inf"), gl.float32, layout=gl.SliceLayout(1, _SCORE))
    sum_N = gl.zeros([_TILE], gl.float32, layout=gl.SliceLayout(1, _SCORE))
    zero_NS = gl.zeros([_TILE, _TILE], gl.float32, layout=_SCORE)
    acc_NJ = gl.zeros([_TILE, _HALF], gl.float32, layout=_RESULT)
    mbarrier.wait(q_filled, 0)
    phase = 0
    for first in range(start, end, 2 * _TILE):
        own = first + OWN * _TILE
        score_NS = gl.full([_TILE, _TILE], float("-inf"), gl.float32, layout=_SCORE)
        if own < end:
            zero = hopper.unknown_zero()
            near, far = k.index(NEAR + zero), k.index(FAR + zero)
            mbarrier.wait(filled.index(NEAR), phase)
            started = warpgroup_mma(q.index(OWN + zero), near.permute((1, 0)), zero_NS, use_acc=False, is_async=True)
            mbarrier.wait(filled.index(FAR), phase)
            started = warpgroup_mma(q.index(OTHER + zero), far.permute((1, 0)), started, is_async=True)
            rope = k_rope.index(OWN + zero).permute((1, 0))
            started = warpgroup_mma(q_rope.index(zero), rope, started, is_async=True)
            score_NS = warpgroup_mma_wait(0, deps=(started,)) * scale_log2
            if own + _TILE > end:
                hopper.wipe(near, end - own, _TILE)
                hopper.wipe(far, end - own, _TILE)
                fence_async_shared()
            score_NS = gl.where((own + s_S)[None, :] < visible_N[:, None], score_NS, float("-inf"))
        own_most_N = gl.max(score_NS, 1)
        if OWN == 0:
            most_now_N = gl.maximum(most_N, own_most_N)
            exchange.index(0).store(most_now_N)
            mbarrier.arrive(most_known.index(0), count=1)
        else:
            mbarrier.wait(most_known.index(0), phase)
            most_now_N = gl.maximum(exchange.index(0).load(gl.SliceLayout(1, _SCORE)), own_most_N)
            exchange.index(1).store(most_now_N)
            mbarrier.arrive(most_known.index(1), count=1)
        shift_N = gl.where(most_now_N == float("-inf"), 0.0, most_now_N)  # no token visible yet
        weight_NS = gl.exp2(score_NS - shift_N[:, None])
        shrink_N = gl.exp2(most_N - shift_N)
        sum_N = sum_N * shrink_N + gl.sum(weight_NS, 1)
        own_weight_NS = gl.convert_layout(weight_NS.to(gl.bfloat16), _WEIGHT)
        acc_NJ *= gl.convert_layout(shrink_N, gl.SliceLayout(1, _RESULT))[:, None]
        if OWN == 0:
            started = warpgroup_mma(own_weight_NS, k.index(NEAR), acc_NJ, is_async=True)
            mbarrier.wait(most_known.index(1), phase)
            most_N = exchange.index(1).load(gl.SliceLayout(1, _SCORE))
            shrink_N = gl.exp2(most_now_N - gl.where(most_N == float("-inf"), 0.0, most_N))
            k_rope.index(0).store((weight_NS * shrink_N[:, None]).to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(weighed.index(0), count=1)
            sum_N *= shrink_N
            acc_NJ = warpgroup_mma_wait(0, deps=(started,))
            mbarrier.arrive(emptied.index(NEAR), count=1)
            if first + _TILE < end:
                acc_NJ *= gl.convert_layout(shrink_N, gl.SliceLayout(1, _RESULT))[:, None]
                mbarrier.wait(weighed.index(1), phase)
                started = warpgroup_mma(k_rope.index(1), k.index(THEIRS), acc_NJ, is_async=True)
                acc_NJ = warpgroup_mma_wait(0, deps=(started,))
                mbarrier.arrive(emptied.index(THEIRS), count=1)
        else:
            most_N = most_now_N
            if own < end:
                k_rope.index(1).store(weight_NS.to(gl.bfloat16))
                fence_async_shared()
                mbarrier.arrive(weighed.index(1), count=1)
                started = warpgroup_mma(own_weight_NS, k.index(NEAR), acc_NJ, is_async=True)
                mbarrier.wait(weighed.index(0), phase)
                started = warpgroup_mma(k_rope.index(0), k.index(THEIRS), started, is_async=True)
                acc_NJ = warpgroup_mma_wait(1, deps=(started,))
                mbarrier.arrive(emptied.index(NEAR), count=1)
                acc_NJ = warpgroup_mma_wait(0, deps=(acc_NJ,))
            else:
                mbarrier.wait(weighed.index(0), phase)
                started = warpgroup_mma(k_rope.index(0), k.index(THEIRS), acc_NJ, is_async=True)
                acc_NJ = warpgroup_mma_wait(0, deps=(started,))
            mbarrier.arrive(emptied.index(THEIRS), count=1)
        phase ^= 1
    _finish(buffers, barriers, out_ptr, lse_ptr, H, Q, acc_NJ, most_N, sum_N, phase, PARTS, OWN)


@gluon.jit(do_not_specialize=["table_stride", "Q"])
def _mla_hopper(
    q_desc, q_rope_desc, k_desc, k_rope_desc, k_ptr, table_ptr, table_stride, length_ptr, out_ptr, lse_ptr, scale_log2,
    H, Q, PAGE: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid: tiles of query rows, parts, sequences."""
    q = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, _HALF], _SHARED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _TILE, _ROPE], _SHARED)
    k = gl.allocate_shared_memory(gl.bfloat16, [4, _TILE, _HALF], _SHARED)  # two tiles, their left and right halves
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, _ROPE], _SHARED)
    exchange = gl.allocate_shared_memory(gl.float32, [2, _TILE], _ROW)
    q_filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    most_known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    sum_known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_filled, count=1)
    for i in gl.static_range(2):
        mbarrier.init(most_known.index(i), count=1)
        mbarrier.init(weighed.index(i), count=1)
        mbarrier.init(sum_known.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=1)
    fence_async_shared()
    part = _part(length_ptr, PARTS)  # not written by the kernel ahead, nor is the table: see `mla_decode.attend`
    if PDL:
        _prefetch(k_ptr, table_ptr, table_stride, part[0], part[1], PAGE)
    pdl.wait(PDL)  # the other warps start after it
    pdl.release(PDL)
    buffers = q, q_rope, k, k_rope, exchange
    barriers = q_filled, filled, emptied, most_known, weighed, sum_known
    descriptors = q_desc, q_rope_desc, k_desc, k_rope_desc
    gl.warp_specialize(
        [
            (_attend, (buffers, barriers, part, out_ptr, lse_ptr, scale_log2, H, Q, PARTS, 0)),
            (_attend, (buffers, barriers, part, out_ptr, lse_ptr, scale_log2, H, Q, PARTS, 1)),
            (_copy_ahead, (buffers, barriers, descriptors, part, table_ptr, table_stride, Q * H, PAGE)),
        ],
        [4, 1],
        [232, 40],  # registers a thread
    )


def takes(q_THX: torch.Tensor, cache: torch.Tensor, latent: int, chip: Chip) -> bool:
    """Whether this is the chip, and these are DeepSeek's sizes, in BF16, without gaps, as copies can take them."""
    fits = latent == LATENT and q_THX.shape[2] == LATENT + ROPE and cache.shape[1] % TILE == 0
    whole = cache.dtype == torch.bfloat16 and cache.is_contiguous() and q_THX.is_contiguous()
    return hopper.runs_tasks(chip) and fits and whole


def launch(
    q_THX: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale_log2: float,
    out_THPC: torch.Tensor,
    lse_THP: torch.Tensor | None,
    chip: Chip,
) -> None:
    """Fill ``out_THPC``, and with several parts ``lse_THP``, as `mla_decode.attend` does, which checks the rest."""
    tokens, heads, width = q_THX.shape
    queries, parts = tokens // len(lengths), 1 if lse_THP is None else lse_THP.shape[2]
    q_NX, k_SX = q_THX.view(-1, width), cache.view(-1, width)
    half, rope = [TILE, LATENT // 2], [TILE, ROPE]
    _mla_hopper[(cdiv(queries * heads, TILE), parts, len(lengths))](
        TensorDescriptor.from_tensor(q_NX, half, _LAYOUT), TensorDescriptor.from_tensor(q_NX, rope, _LAYOUT),
        TensorDescriptor.from_tensor(k_SX, half, _LAYOUT), TensorDescriptor.from_tensor(k_SX, rope, _LAYOUT),
        cache, table, table.stride(0), lengths, out_THPC, lse_THP, scale_log2, heads, queries, PAGE=cache.shape[1],
        PARTS=parts, PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
