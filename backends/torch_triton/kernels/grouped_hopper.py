"""`grouped` on Hopper for prompts of many tokens: its warps have different tasks.

One warp has tiles of activations and weights copied ahead into a ring of buffers. Three groups of four warps multiply,
each 64 of the tile's rows: while one adds up its product in FP32, the matrix units are the others'. What limits them
is the traffic between the L2 cache and the processors: hence tiles as tall as registers allow, and no copies of rows
that are not there. Programs stay and walk all tiles, so that copying goes on while results are written. Sums are those
of `grouped`, bit for bit.

Shape letters as in `grouped`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper
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
_ROWS = gl.constexpr(GROUP_ROWS)
_GROUPS = gl.constexpr(GROUPS)
_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32]))
_RESULT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 16 bytes a thread, whole rows


@gluon.jit
def _copy_ahead(buffers, x_desc, w_desc, expert_ptr, start_ptr, rows_ptr, sizes, STAGES: gl.constexpr):
    x_ring, w_ring, filled, emptied = buffers
    U, _, E, N, BLOCKS = sizes
    count = 0
    columns = N // _TILE
    for tile in range(gl.program_id(0), U * columns, gl.num_programs(0)):
        expert = gl.load(expert_ptr + tile // columns)
        if (expert >= 0) & (expert < E):
            start = gl.load(start_ptr + tile // columns)
            groups = gl.cdiv(gl.load(rows_ptr + tile // columns), _ROWS)
            w_row = expert * N + tile % columns * _TILE
            for block in range(BLOCKS):
                stage = count % STAGES
                ready = filled.index(stage)
                mbarrier.wait(emptied.index(stage), (count // STAGES & 1) ^ 1)
                for number in gl.static_range(1, _GROUPS + 1):
                    mbarrier.expect(ready, (_TILE + number * _ROWS) * _TILE, pred=groups == number)
                for group in gl.static_range(_GROUPS):
                    at, room = [start + group * _ROWS, block * _TILE], x_ring.index(stage * _GROUPS + group)
                    tma.async_copy_global_to_shared(x_desc, at, ready, room, pred=group < groups)
                tma.async_copy_global_to_shared(w_desc, [w_row, block * _TILE], ready, w_ring.index(stage))
                count += 1


@gluon.jit
def _multiply(buffers, given, sizes, SCATTER: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr):
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
                scale_ptr = scales_ptr + (expert.to(gl.int64) * columns + column) * BLOCKS
                scale_M = gl.load(x_scale_ptrs_M) * gl.load(scale_ptr)
                acc_MJ = zero_MJ
                for block in range(BLOCKS):
                    following = gl.minimum(block + 1, BLOCKS - 1)
                    next_x_scale_M = gl.load(x_scale_ptrs_M + following * x_scales_stride)
                    next_scale = gl.load(scale_ptr + following)
                    stage = count % STAGES
                    mbarrier.wait(filled.index(stage), count // STAGES & 1)
                    x = x_ring.index(stage * _GROUPS + OWN)
                    w = w_ring.index(stage).permute((1, 0))
                    started = warpgroup_mma(x, w, zero_MJ, use_acc=False, is_async=True)
                    product_MJ = warpgroup_mma_wait(0, deps=(started,))
                    mbarrier.arrive(emptied.index(stage), count=1)
                    acc_MJ += product_MJ * scale_M[:, None]
                    scale_M = next_x_scale_M * next_scale
                    count += 1
                if SCATTER:
                    own_M = row_M < end
                    pair_M = gl.load(pair_ptr + row_M, mask=own_M, other=0)
                    acc_MJ *= gl.load(factors_ptr + pair_M, mask=own_M, other=0.0)[:, None]
                out_M = first + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _RESULT))
                own_M = out_M < end
                if SCATTER:
                    out_M = gl.load(pair_ptr + out_M, mask=own_M, other=0)
                n_J = column * _TILE + gl.arange(0, _TILE, layout=gl.SliceLayout(0, _RESULT))
                out_MJ = gl.convert_layout(acc_MJ.to(gl.bfloat16), _RESULT)
                gl.store(out_ptr + (out_M.to(gl.int64) * N)[:, None] + n_J[None, :], out_MJ, mask=own_M[:, None])
            else:
                for _ in range(BLOCKS):
                    stage = count % STAGES
                    mbarrier.wait(filled.index(stage), count // STAGES & 1)
                    mbarrier.arrive(emptied.index(stage), count=1)
                    count += 1


@gluon.jit(do_not_specialize=["x_scales_stride", "U", "R"])
def _grouped_hopper(
    x_desc, w_desc, x_scales_ptr, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr, rows_ptr, scales_ptr,
    out_ptr, U, R, E, N, BLOCKS, SCATTER: gl.constexpr, STAGES: gl.constexpr,
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
            (_multiply, (buffers, given, sizes, SCATTER, STAGES, 0)),
            (_multiply, (buffers, given, sizes, SCATTER, STAGES, 1)),
            (_multiply, (buffers, given, sizes, SCATTER, STAGES, 2)),
            (_copy_ahead, (buffers, x_desc, w_desc, expert_ptr, start_ptr, rows_ptr, sizes, STAGES)),
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
    pairs: tuple[torch.Tensor, ...],
    factors_TP: torch.Tensor | None,
    out_RN: torch.Tensor,
    processors: int,
) -> None:
    """Fill ``out_RN`` as `grouped.grouped` does, which checks what both take; ``pairs`` are its `Sorted`."""
    codes_ENK, scales_ERC = weight
    experts, outputs, inputs = codes_ENK.shape
    contiguous = all(part.is_contiguous() for part in (x.codes, x.scales.t(), codes_ENK, scales_ERC, out_RN))
    check(contiguous, "operands must be contiguous, scales of activations group by group", "grouped_hopper")
    _grouped_hopper[(processors,)](
        TensorDescriptor.from_tensor(x.codes, [GROUP_ROWS, TILE], _LAYOUT),
        TensorDescriptor.from_tensor(codes_ENK.view(experts * outputs, inputs), [TILE, TILE], _LAYOUT),
        x.scales, x.scales.stride(1), factors_TP, *pairs, scales_ERC, out_RN, len(pairs[1]), len(x.codes), experts,
        outputs, inputs // TILE, SCATTER=factors_TP is not None, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
