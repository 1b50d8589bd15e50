"""`grouped` on Hopper for prompts of many tokens: its warps have different tasks.

One warp has tiles of activations and weights copied ahead into a ring of buffers. Three groups of four warps multiply,
each 64 of the tile's rows, in two halves of 64 columns: while it adds up one half's product in FP32, the other's is on
its way, and the matrix units are the other groups' besides. What limits them is power, and the traffic between the L2
cache and the processors: hence tiles as tall as registers allow, and no copies of rows that are not there. Programs
stay and walk all tiles, so that copying goes on while results are written. Sums are those of `grouped`, bit for bit.

A gated tile's halves are 64 rows of gate and the 64 rows of up with the same numbers: a thread holds both factors of
what it writes, and half as much is written, and read again, as of gate and up.

Shape letters as in `grouped`.
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

from . import hopper, tiles
from .chips import Chip, check
from .quant import Codes
from .weights import Fp8Weight, Weight

TILE = 128  # outputs and inputs of a tile: one scale of the weights
GROUPS = 3
GROUP_ROWS = 64
ROWS = GROUPS * GROUP_ROWS  # of a tile
STAGES = 5  # buffers of 40 KiB
_LAYOUT = gl.NVMMASharedLayout(128, 8, rank=2)  # rows of 128 bytes, swizzled as the matrix units read them
_TILE = gl.constexpr(TILE)
_HALF = gl.constexpr(TILE // 2)
_ROWS = gl.constexpr(GROUP_ROWS)
_GROUPS = gl.constexpr(GROUPS)
_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE // 2, 32]))  # of a half
_RESULT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, whole rows
_silu_product = gluon.jit(tiles.silu_product.fn)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The buffer after ``stage``, and the parity of its barriers."""
    stage += 1
    again = stage == STAGES
    return gl.where(again, 0, stage), gl.where(again, phase ^ 1, phase)


@gluon.jit
def _copy_ahead(
    buffers, x_desc, w_desc, expert_ptr, start_ptr, rows_ptr, sizes, GATED: gl.constexpr, STAGES: gl.constexpr
):
    x_ring, w_ring, filled, emptied = buffers
    U, _, E, N, BLOCKS = sizes
    stage, phase = 0, 1
    columns = N // _TILE
    right = N // 2 if GATED else _HALF  # from the first row of a tile's left half to that of its right one
    for tile in range(gl.program_id(0), U * columns, gl.num_programs(0)):
        expert = gl.load(expert_ptr + tile // columns)
        if (expert >= 0) & (expert < E):
            start = gl.load(start_ptr + tile // columns)
            groups = gl.cdiv(gl.load(rows_ptr + tile // columns), _ROWS)
            w_row = expert * N + tile % columns * (_HALF if GATED else _TILE)
            for block in range(BLOCKS):
                ready = filled.index(stage)
                mbarrier.wait(emptied.index(stage), phase)
                for number in gl.static_range(1, _GROUPS + 1):
                    mbarrier.expect(ready, (_TILE + number * _ROWS) * _TILE, pred=groups == number)
                for group in gl.static_range(_GROUPS):
                    at, room = [start + group * _ROWS, block * _TILE], x_ring.index(stage * _GROUPS + group)
                    hopper.copy_tile(x_desc, at, ready, room, pred=group < groups)
                w = w_ring.index(stage)
                hopper.copy_tile(w_desc, [w_row, block * _TILE], ready, w.slice(0, _HALF))
                hopper.copy_tile(w_desc, [w_row + right, block * _TILE], ready, w.slice(_HALF, _HALF))
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _load_scales(scale_ptr, up, GATED: gl.constexpr):
    """Of a tile's rows of weights, those of each half; if gated, up's lie ``up`` behind gate's."""
    scale = gl.load(scale_ptr)
    return scale, gl.load(scale_ptr + up) if GATED else scale


@gluon.jit
def _start(x_ring, w_ring, stage, OWN: gl.constexpr, HALF: gl.constexpr, room_MJ):
    """Of a group's rows and a half's columns; ``room_MJ`` is not read."""
    w = w_ring.index(stage).slice(HALF * _HALF, _HALF).permute((1, 0))
    return warpgroup_mma(x_ring.index(stage * _GROUPS + OWN), w, room_MJ, use_acc=False, is_async=True)


@gluon.jit
def _store(out_ptr, pair_ptr, acc_MJ, first, end, n, N, SCATTER: gl.constexpr):
    """What is before ``end`` of a tile's rows, in rows of N, from column n on."""
    row_M = first + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _RESULT))
    own_M = row_M < end
    if SCATTER:
        row_M = gl.load(pair_ptr + row_M, mask=own_M, other=0)
    n_J = n + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _RESULT))
    out_MJ = gl.convert_layout(acc_MJ.to(gl.bfloat16), _RESULT)
    gl.store(out_ptr + (row_M.to(gl.int64) * N)[:, None] + n_J[None, :], out_MJ, mask=own_M[:, None])


@gluon.jit
def _multiply(
    buffers, given, sizes, SCATTER: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr
):
    """Rows of group OWN of every tile. A group without rows only lets the buffers go.

    Two blocks of inputs a round, after which no product is on its way: the assembler follows them through no loop.
    """
    x_ring, w_ring, filled, emptied = buffers
    x_scales_ptr, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr, rows_ptr, scales_ptr, out_ptr = given
    U, R, E, N, BLOCKS = sizes
    stage, phase = 0, 0
    columns = N // _TILE
    up = columns // 2 * BLOCKS
    zero_MJ = gl.zeros([_ROWS, _HALF], gl.float32, layout=_PRODUCT)
    for tile in range(gl.program_id(0), U * columns, gl.num_programs(0)):
        u, column = tile // columns, tile % columns
        expert = gl.load(expert_ptr + u)
        if (expert >= 0) & (expert < E):
            start = gl.load(start_ptr + u)
            end = start + gl.load(rows_ptr + u)
            first = start + OWN * _ROWS
            if first < end:
                row_M = first + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _PRODUCT))
                x_scale_ptrs_M = x_scales_ptr + gl.minimum(row_M, R - 1)
                w_block = column // 2 if GATED else column
                scale_ptr = scales_ptr + (expert.to(gl.int64) * columns + w_block) * BLOCKS
                x_scale_M, odd_x_scale_M = gl.load(x_scale_ptrs_M), gl.load(x_scale_ptrs_M + x_scales_stride)
                scale, up_scale = _load_scales(scale_ptr, up, GATED)
                odd_scale, odd_up_scale = _load_scales(scale_ptr + 1, up, GATED)
                left_MJ, right_MJ = zero_MJ, zero_MJ
                for block in range(0, BLOCKS, 2):
                    following = gl.minimum(block + 2, BLOCKS - 2)
                    odd_stage, odd_phase = _next(stage, phase, STAGES)
                    mbarrier.wait(filled.index(stage), phase)
                    left = _start(x_ring, w_ring, stage, OWN, 0, zero_MJ)
                    right = _start(x_ring, w_ring, stage, OWN, 1, zero_MJ)
                    left = warpgroup_mma_wait(1, deps=(left,))
                    left_MJ = hopper.settled(left_MJ + left * (x_scale_M * scale)[:, None])
                    mbarrier.wait(filled.index(odd_stage), odd_phase)
                    left = _start(x_ring, w_ring, odd_stage, OWN, 0, left)
                    right = warpgroup_mma_wait(1, deps=(right,))
                    mbarrier.arrive(emptied.index(stage), count=1)
                    right_MJ = hopper.settled(right_MJ + right * (x_scale_M * up_scale)[:, None])
                    right = _start(x_ring, w_ring, odd_stage, OWN, 1, right)
                    x_scale_M = gl.load(x_scale_ptrs_M + following * x_scales_stride)
                    scale, up_scale = _load_scales(scale_ptr + following, up, GATED)
                    left = warpgroup_mma_wait(1, deps=(left,))
                    left_MJ = hopper.settled(left_MJ + left * (odd_x_scale_M * odd_scale)[:, None])
                    right = warpgroup_mma_wait(0, deps=(right,))
                    mbarrier.arrive(emptied.index(odd_stage), count=1)
                    right_MJ = hopper.settled(right_MJ + right * (odd_x_scale_M * odd_up_scale)[:, None])
                    odd_x_scale_M = gl.load(x_scale_ptrs_M + (following + 1) * x_scales_stride)
                    odd_scale, odd_up_scale = _load_scales(scale_ptr + following + 1, up, GATED)
                    stage, phase = _next(odd_stage, odd_phase, STAGES)
                if SCATTER:
                    own_M = row_M < end
                    pair_M = gl.load(pair_ptr + row_M, mask=own_M, other=0)
                    factor_M = gl.load(factors_ptr + pair_M, mask=own_M, other=0.0)
                    left_MJ *= factor_M[:, None]
                    right_MJ *= factor_M[:, None]
                if GATED:
                    h_MJ = _silu_product(left_MJ, right_MJ)
                    _store(out_ptr, pair_ptr, h_MJ, first, end, column * _HALF, N // 2, SCATTER)
                else:
                    _store(out_ptr, pair_ptr, left_MJ, first, end, column * _TILE, N, SCATTER)
                    _store(out_ptr, pair_ptr, right_MJ, first, end, column * _TILE + _HALF, N, SCATTER)
            else:
                for _ in range(BLOCKS):
                    mbarrier.wait(filled.index(stage), phase)
                    mbarrier.arrive(emptied.index(stage), count=1)
                    stage, phase = _next(stage, phase, STAGES)


@gluon.jit(do_not_specialize=["x_scales_stride", "U", "R"])
def _grouped_hopper(
    x_desc, w_desc, x_scales_ptr, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr, rows_ptr, scales_ptr,
    out_ptr, U, R, E, N, BLOCKS, SCATTER: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as stay on the chip at a time."""
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * _GROUPS, _ROWS, _TILE], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, _TILE, _TILE], w_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=_GROUPS)
    fence_async_shared()
    buffers = x_ring, w_ring, filled, emptied
    sizes = U, R, E, N, BLOCKS
    given = x_scales_ptr, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr, rows_ptr, scales_ptr, out_ptr
    gl.warp_specialize(
        [
            (_multiply, (buffers, given, sizes, SCATTER, GATED, STAGES, 0)),
            (_multiply, (buffers, given, sizes, SCATTER, GATED, STAGES, 1)),
            (_multiply, (buffers, given, sizes, SCATTER, GATED, STAGES, 2)),
            (_copy_ahead, (buffers, x_desc, w_desc, expert_ptr, start_ptr, rows_ptr, sizes, GATED, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 40],  # registers a thread
    )


def takes(weight: Weight, chip: Chip) -> bool:
    """Whether this is the chip, and the weights are FP8 in whole blocks, an even number of them along a row."""
    outputs, inputs = weight.codes.shape[-2:]
    whole = outputs % TILE == inputs % (2 * TILE) == 0
    return hopper.runs_tasks(chip) and isinstance(weight, Fp8Weight) and whole


def launch(
    x: Codes,
    weight: Fp8Weight,
    pairs: tuple[torch.Tensor, ...],
    factors_TP: torch.Tensor | None,
    out: torch.Tensor,
    gated: bool,
    processors: int,
) -> None:
    """Fill ``out`` as `grouped.grouped` does, which checks what both take; ``pairs`` are its `Sorted`."""
    codes_ENK, scales_ERC = weight
    experts, outputs, inputs = codes_ENK.shape
    contiguous = all(part.is_contiguous() for part in (x.codes, x.scales.t(), codes_ENK, scales_ERC, out))
    check(contiguous, "operands must be contiguous, scales of activations group by group", "grouped_hopper")
    check(not gated or outputs % (2 * TILE) == 0, "gate and up rows must be whole blocks", "grouped_hopper")
    check(inputs % (2 * TILE) == 0, "rows must be an even number of blocks", "grouped_hopper")
    _grouped_hopper[(processors,)](
        TensorDescriptor.from_tensor(x.codes, [GROUP_ROWS, TILE], _LAYOUT),
        TensorDescriptor.from_tensor(codes_ENK.view(experts * outputs, inputs), [TILE // 2, TILE], _LAYOUT),
        x.scales, x.scales.stride(1), factors_TP, *pairs, scales_ERC, out, len(pairs[1]), len(x.codes), experts,
        outputs, inputs // TILE, SCATTER=factors_TP is not None, GATED=gated, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
