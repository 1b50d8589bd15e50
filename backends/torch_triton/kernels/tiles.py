"""Products of FP8 weight tiles on the matrix units, as functions for kernels.

Weights [N, K] have one scale per 128 x 128 block, activations one per row and 128 channels; partial blocks at the right
and lower edges are legal. Weights lie in the chip's FP8 type, or as e4m3fn bytes where it has no FP8 units, and each
byte is read once. They are the left operand, so that a few tokens fill the narrow side. A tile's rows never cross a row
of blocks, except that gate and up rows of a gated product are one tile, so that one pass over the activations serves
both.

Shape letters: J weight rows of a tile, M activation rows of a tile, X 128 channels.
"""

import triton
import triton.language as tl

from . import e4m3


@triton.jit
def rows_product(
    acc_JM, x_ptr, x_row_M, x_valid_M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride,
    w_ptr, row_J, w_stride, scales_ptr, scale_row_J, scales_stride, first_block, last_block, K,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc_JM`` plus W x^T over the blocks given. Each block's product is added to it in FP32."""
    x = tl.arange(0, 128)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        k_X = block * 128 + x
        x_ptrs_MX = x_ptr + (x_row_M * x_stride)[:, None] + k_X[None, :]
        w_ptrs_JX = w_ptr + (row_J * w_stride)[:, None] + k_X[None, :]
        if EVEN_K:
            x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None], other=0.0)
            w_JX = tl.load(w_ptrs_JX)
        else:
            x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None] & (k_X < K)[None, :], other=0.0)
            w_JX = tl.load(w_ptrs_JX, mask=tl.broadcast_to((k_X < K)[None, :], w_ptrs_JX.shape), other=0.0)
        scale_J = tl.load(scales_ptr + scale_row_J * scales_stride + block)
        if QUANTISED:
            x_scale_ptrs_M = x_scales_ptr + x_row_M * x_scales_row_stride + block * x_scales_stride
            x_scale_M = tl.load(x_scale_ptrs_M, mask=x_valid_M, other=0.0)
            acc_JM += tl.dot(w_JX, tl.trans(x_MX)) * (scale_J[:, None] * x_scale_M[None, :])
        else:
            acc_JM += tl.dot(e4m3.decode(w_JX).to(tl.bfloat16), tl.trans(x_MX)) * scale_J[:, None]
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
def silu_product(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up
