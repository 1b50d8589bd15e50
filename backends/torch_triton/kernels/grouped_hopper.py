"""`grouped` on Hopper for prompts of many tokens: its warps have different tasks.

One warp has tiles of activations and weights copied ahead into a ring of buffers. Three groups of four warps multiply,
each 64 of the tile's rows: while one adds up its product in FP32, the matrix units are the others'. What limits them
is the traffic between the L2 cache and the processors: hence tiles as tall as registers allow, and no copies of rows
that are not there. Programs stay and walk all tiles, so that copying goes on while results are written. Sums are those
of `grouped`, bit for bit.

A gated tile has 64 rows of gate and the 64 rows of up with the same numbers: a thread holds both factors of what it
writes, and half as much is written, and read again, as of gate and up.

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
_HALF = gl.constexpr(TILE // 2)  # of a gated tile
_ROWS = gl.constexpr(GROUP_ROWS)
_GROUPS = gl.constexpr(GROUPS)
_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32]))
_RESULT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 16 bytes a thread, whole rows
_JOINED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_silu_product = gluon.jit(tiles.silu_product.fn)


@gluon.jit
def _copy_weights(w_desc, w_row, up_row, k, ready, w, GATED: gl.constexpr):
    if GATED:
        hopper.copy_tile(w_desc, [w_row, k], ready, w.slice(0, _HALF))
        hopper.copy_tile(w_desc, [up_row, k], ready, w.slice(_HALF, _HALF))
    else:
        hopper.copy_tile(w_desc, [w_row, k], ready, w)


@gluon.jit
def _copy_ahead(
    buffers, x_desc, w_desc, expert_ptr, start_ptr, rows_ptr, sizes, GATED: gl.constexpr, STAGES: gl.constexpr
):
    x_ring, w_ring, filled, emptied = buffers
    U, _, E, N, BLOCKS = sizes
    count = 0
    columns = N // _TILE
    for tile in range(gl.program_id(0), U * columns, gl.num_programs(0)):
        expert = gl.load(expert_ptr + tile // columns)
        if (expert >= 0) & (expert < E):
            start = gl.load(start_ptr + tile // columns)
            groups = gl.cdiv(gl.load(rows_ptr + tile // columns), _ROWS)
            w_row = expert * N + tile % columns * (_HALF if GATED else _TILE)
            for block in range(BLOCKS):
                stage = count % STAGES
                ready = filled.index(stage)
                mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
                for number in gl.static_range(1, _GROUPS + 1):
                    mbarrier.expect(ready, (_TILE + number * _ROWS) * _TILE, pred=groups == number)
                for group in gl.static_range(_GROUPS):
                    at, room = [start + group * _ROWS, block * _TILE], x_ring.index(stage * _GROUPS + group)
                    hopper.copy_tile(x_desc, at, ready, room, pred=group < groups)
                _copy_weights(w_desc, w_row, w_row + N // 2, block * _TILE, ready, w_ring.index(stage), GATED)
                count += 1


@gluon.jit
def _load_scales(scale_ptr, up, GATED: gl.constexpr):
    """Of a tile's rows of weights; if gated, of gate's and, ``up`` behind it, of up's."""
    scale = gl.load(scale_ptr)
    return scale, gl.load(scale_ptr + up) if GATED else scale


@gluon.jit
def _of_columns(scale_M, up_scale_M, GATED: gl.constexpr):
    """For each number of a tile. Which half it is in is decided while this is compiled: no thread selects."""
    scale_MJ = scale_M[:, None]
    if GATED:
        is_up_J = gl.arange(0, _TILE, layout=gl.SliceLayout(0, _PRODUCT)) >= _HALF
        scale_MJ = gl.where(is_up_J[None, :], up_scale_M[:, None], scale_MJ)
    return scale_MJ


@gluon.jit
def _store(out_ptr, pair_ptr, acc_MJ, first, end, column, N, SCATTER: gl.constexpr, LAYOUT: gl.constexpr):
    """What is before ``end`` of a tile's rows, in rows of N."""
    WIDTH: gl.constexpr = acc_MJ.shape[1]
    row_M = first + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, LAYOUT))
    own_M = row_M < end
    if SCATTER:
        row_M = gl.load(pair_ptr + row_M, mask=own_M, other=0)
    n_J = column * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    out_MJ = gl.convert_layout(acc_MJ.to(gl.bfloat16), LAYOUT)
    gl.store(out_ptr + (row_M.to(gl.int64) * N)[:, None] + n_J[None, :], out_MJ, mask=own_M[:, None])


@gluon.jit
def _multiply(
    buffers, given, sizes, SCATTER: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr
):
    """Rows of group OWN of every tile. A group without rows only lets the buffers go."""
    x_ring, w_ring, filled, emptied = buffers
    x_scales_ptr, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr, rows_ptr, scales_ptr, out_ptr = given
    U, R, E, N, BLOCKS = sizes
    count = 0
    columns = N // _TILE
    zero_MJ = gl.zeros([_ROWS, _TILE], gl.float32, layout=_PRODUCT)
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
                up = columns // 2 * BLOCKS
                x_scale_M = gl.load(x_scale_ptrs_M)
                scale, up_scale = _load_scales(scale_ptr, up, GATED)
                scale_M, up_scale_M = x_scale_M * scale, x_scale_M * up_scale
                acc_MJ = zero_MJ
                for block in range(BLOCKS):
                    following = gl.minimum(block + 1, BLOCKS - 1)
                    next_x_scale_M = gl.load(x_scale_ptrs_M + following * x_scales_stride)
                    next_scale, next_up_scale = _load_scales(scale_ptr + following, up, GATED)
                    stage = count % STAGES
                    mbarrier.wait(filled.index(stage), count // STAGES & 1)
                    x = x_ring.index(stage * _GROUPS + OWN)
                    w = w_ring.index(stage).permute((1, 0))
                    started = warpgroup_mma(x, w, zero_MJ, use_acc=False, is_async=True)
                    product_MJ = warpgroup_mma_wait(0, deps=(started,))
                    mbarrier.arrive(emptied.index(stage), count=1)
                    acc_MJ += product_MJ * _of_columns(scale_M, up_scale_M, GATED)
                    scale_M, up_scale_M = next_x_scale_M * next_scale, next_x_scale_M * next_up_scale
                    count += 1
                if SCATTER:
                    own_M = row_M < end
                    pair_M = gl.load(pair_ptr + row_M, mask=own_M, other=0)
                    acc_MJ *= gl.load(factors_ptr + pair_M, mask=own_M, other=0.0)[:, None]
                if GATED:
                    gate_MI, up_MI = acc_MJ.reshape([_ROWS, 2, _HALF]).permute((0, 2, 1)).split()
                    h_MI = _silu_product(gate_MI, up_MI)
                    _store(out_ptr, pair_ptr, h_MI, first, end, column, N // 2, False, _JOINED)
                else:
                    _store(out_ptr, pair_ptr, acc_MJ, first, end, column, N, SCATTER, _RESULT)
            else:
                for _ in range(BLOCKS):
                    stage = count % STAGES
                    mbarrier.wait(filled.index(stage), count // STAGES & 1)
                    mbarrier.arrive(emptied.index(stage), count=1)
                    count += 1


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
    """Whether this is the chip, and the weights are FP8 in whole blocks."""
    whole = not any(size % TILE for size in weight.codes.shape[-2:])
    return hopper.runs_tasks(chip) and isinstance(weight, Fp8Weight) and whole


def launch(
    x: Codes,
    weight: Fp8Weight,
    tiles: tuple[torch.Tensor, ...],
    factors_TP: torch.Tensor | None,
    out: torch.Tensor,
    gated: bool,
    processors: int,
) -> None:
    """Fill ``out`` as `grouped.grouped` does, which checks what both take; ``tiles``: of its sorted pairs."""
    codes_ENK, scales_ERC = weight
    experts, outputs, inputs = codes_ENK.shape
    contiguous = all(part.is_contiguous() for part in (x.codes, x.scales.t(), codes_ENK, scales_ERC, out))
    check(contiguous, "operands must be contiguous, scales of activations group by group", "grouped_hopper")
    check(not gated or outputs % (2 * TILE) == 0, "gate and up rows must be whole blocks", "grouped_hopper")
    w_rows = TILE // 2 if gated else TILE  # of a copy
    _grouped_hopper[(processors,)](
        TensorDescriptor.from_tensor(x.codes, [GROUP_ROWS, TILE], _LAYOUT),
        TensorDescriptor.from_tensor(codes_ENK.view(experts * outputs, inputs), [w_rows, TILE], _LAYOUT),
        x.scales, x.scales.stride(1), factors_TP, *tiles, scales_ERC, out, len(tiles[1]), len(x.codes), experts,
        outputs, inputs // TILE, SCATTER=factors_TP is not None, GATED=gated, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
