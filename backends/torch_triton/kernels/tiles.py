"""Products of quantised weight tiles on the matrix units, as functions for kernels.

`weights` says how weights lie. Each byte of them is read once. They are the left operand, so that a few tokens fill the
narrow side. Gate and up rows of a gated product are one tile, so that one pass over the activations serves both.
Activations: FP8 codes with a scale per row and 128 channels, INT8 codes with one per row, or BF16.

Shape letters: J weight rows of a tile, M activation rows of a tile, X channels of a block or of a group.
"""

import triton
import triton.language as tl

from . import e4m3, int4


@triton.jit
def rows_product(
    x_ptr, x_row_M, x_valid_M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride,
    w_ptr, row_J, valid_J, w_stride, scales_ptr, scale_row_J, scales_stride, order_ptr, first_block, last_block, K,
    KIND: tl.constexpr, GROUPS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
    INSTRUCTION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W x^T in FP32, [J, M], over the blocks given.

    ``valid_J``: rows that are read, or None for all. ``scale_row_J``: each row's row of blocks. The strides of w and of
    its scales are those of rows, and of INT4's blocks and groups.
    """
    if KIND == "int4":
        acc_JM = _int4_product(
            x_ptr, x_row_M, x_valid_M, x_stride, w_ptr, row_J, valid_J, w_stride, scales_ptr, scales_stride, order_ptr,
            first_block, last_block, K, GROUPS, EVEN_K, INSTRUCTION, STAGES,
        )  # fmt: skip
    elif KIND == "int8":
        sum_JM = tl.zeros((row_J.shape[0], x_row_M.shape[0]), tl.int32)
        for block in tl.range(first_block, last_block, num_stages=STAGES):
            w_JX, x_MX = _block(x_ptr, x_row_M, x_valid_M, x_stride, w_ptr, row_J, valid_J, w_stride, block, K, EVEN_K)
            sum_JM = tl.dot(w_JX, tl.trans(x_MX), sum_JM, out_dtype=tl.int32)
        acc_JM = sum_JM.to(tl.float32) * tl.load(scales_ptr + row_J)[:, None]
    else:
        acc_JM = tl.zeros((row_J.shape[0], x_row_M.shape[0]), tl.float32)
        for block in tl.range(first_block, last_block, num_stages=STAGES):
            w_JX, x_MX = _block(x_ptr, x_row_M, x_valid_M, x_stride, w_ptr, row_J, valid_J, w_stride, block, K, EVEN_K)
            scale_J = tl.load(scales_ptr + scale_row_J * scales_stride + block)
            if KIND == "int8 blocks":
                acc_JM += tl.dot(w_JX, tl.trans(x_MX), out_dtype=tl.int32).to(tl.float32) * scale_J[:, None]
            elif QUANTISED:
                x_scale_ptrs_M = x_scales_ptr + x_row_M * x_scales_row_stride + block * x_scales_stride
                x_scale_M = tl.load(x_scale_ptrs_M, mask=x_valid_M, other=0.0)
                acc_JM += tl.dot(w_JX, tl.trans(x_MX)) * (scale_J[:, None] * x_scale_M[None, :])
            else:
                acc_JM += tl.dot(e4m3.decode(w_JX).to(tl.bfloat16), tl.trans(x_MX)) * scale_J[:, None]
    if KIND == "int8" or KIND == "int8 blocks":
        acc_JM *= tl.load(x_scales_ptr + x_row_M * x_scales_row_stride, mask=x_valid_M, other=0.0)[None, :]
    return acc_JM


@triton.jit
def _block(x_ptr, x_row_M, x_valid_M, x_stride, w_ptr, row_J, valid_J, w_stride, block, K, EVEN_K: tl.constexpr):
    """Tiles of weights and activations of 128 channels."""
    k_X = block * 128 + tl.arange(0, 128)
    x_ptrs_MX = x_ptr + (x_row_M * x_stride)[:, None] + k_X[None, :]
    w_ptrs_JX = w_ptr + (row_J * w_stride)[:, None] + k_X[None, :]
    if EVEN_K:
        x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None], other=0.0)
        w_JX = _load_rows(w_ptrs_JX, valid_J)
    else:
        x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None] & (k_X < K)[None, :], other=0.0)
        w_JX = tl.load(w_ptrs_JX, mask=tl.broadcast_to((k_X < K)[None, :], w_ptrs_JX.shape), other=0.0)
    return w_JX, x_MX


@triton.jit
def _load_rows(ptrs_JX, valid_J):
    if valid_J is None:
        out_JX = tl.load(ptrs_JX)
    else:
        out_JX = tl.load(ptrs_JX, mask=tl.broadcast_to(valid_J[:, None], ptrs_JX.shape), other=0.0)
    return out_JX


@triton.jit
def rows_of_tile(n, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of the matrix, and their rows of blocks, of the tile that begins at row n of N.

    A tile has BLOCK_N places, a power of two, of which it uses ROWS. If gated, up's rows are behind gate's.
    """
    j_J = tl.arange(0, 2 * BLOCK_N if GATED else BLOCK_N)
    matrix_J = j_J // BLOCK_N * N
    row_J = (matrix_J + tl.minimum(n + j_J % BLOCK_N, N - 1)).to(tl.int64)
    scale_row_J = (matrix_J + n) // 128 if ROWS == BLOCK_N else row_J // 128
    return row_J, scale_row_J


@triton.jit
def used_places(ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Which places of such a tile have a row."""
    return tl.arange(0, 2 * BLOCK_N if GATED else BLOCK_N) % BLOCK_N < ROWS


@triton.jit
def _int4_product(
    x_ptr, x_row_M, x_valid_M, x_stride, w_ptr, row_J, valid_J, block_stride, scales_ptr, scales_stride, order_ptr,
    first_block, last_block, K, GROUPS: tl.constexpr, EVEN_K: tl.constexpr, INSTRUCTION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Activations past K are zero, so that codes past it may be anything."""
    x_ptr_M = x_ptr + x_row_M * x_stride
    w_ptrs_JX = w_ptr + (row_J * 32)[:, None] + tl.arange(0, 32)[None, :]
    acc_JM = tl.zeros((row_J.shape[0], x_row_M.shape[0]), tl.float32)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        words_JX = _load_rows(w_ptrs_JX + block * block_stride, valid_J)
        groups = int4.load_groups(scales_ptr + block * GROUPS * scales_stride + row_J, scales_stride, GROUPS)
        fields = int4.decode(words_JX, groups, INSTRUCTION)
        for group in tl.static_range(GROUPS):
            k_X = block * 128 + group * (128 // GROUPS) + tl.arange(0, 128 // GROUPS)
            valid_MX = x_valid_M[:, None] if EVEN_K else x_valid_M[:, None] & (k_X < K)[None, :]
            from_X = k_X if order_ptr is None else tl.load(order_ptr + k_X)
            x_MX = tl.load(x_ptr_M[:, None] + from_X[None, :], mask=valid_MX, other=0.0)
            product_JM = tl.dot(int4.channels(fields, group, GROUPS), tl.trans(x_MX))
            acc_JM += product_JM * int4.scale(groups, group, GROUPS)[:, None]
    return acc_JM


@triton.jit
def is_last(counter_ptr, programs):
    """Whether this is the last of ``programs`` programs to get here; their earlier writes are then visible.

    The counter is zero again afterwards, for the next launch.
    """
    tl.debug_barrier()  # all threads have written
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def is_own(expert, E):
    """Whether it is in a stack of E experts: others are other ranks'."""
    return (expert >= 0) & (expert < E)


@triton.jit
def is_past(t, rows_ptr):
    """Whether row t is after the last one to be worked on. Without a pointer none is."""
    last = t if rows_ptr is None else tl.load(rows_ptr) - 1
    return t > last


@triton.jit
def silu_product(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up
