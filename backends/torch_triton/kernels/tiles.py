"""Products of FP8 weight tiles, as functions for kernels: one row on the vector units, several on the matrix units.

Weights [N, K] have one scale per 128 x 128 block, activations one per row and 128 channels; partial blocks at the right
and lower edges are legal. Weights are read exactly once and lie in the chip's FP8 type, or as e4m3fn bytes where the
chip has no FP8 units. A tile's rows never cross a row of blocks.

Shape letters: N weight rows of a tile, M activation rows of a tile, B blocks of 128 channels, X 128 channels.
"""

import triton
import triton.language as tl

from . import e4m3


@triton.jit
def weight_tile(w_ptr, row_N, w_stride, first_block, K, BLOCKS: tl.constexpr, EVEN_K: tl.constexpr):
    """Codes [N, B, X] of ``BLOCKS`` blocks from ``first_block``. ``row_N`` are valid rows, int64."""
    k_BX = (first_block + tl.arange(0, BLOCKS))[:, None] * 128 + tl.arange(0, 128)[None, :]
    ptrs_NBX = w_ptr + (row_N * w_stride)[:, None, None] + k_BX[None, :, :]
    if EVEN_K:
        return tl.load(ptrs_NBX, eviction_policy="evict_first")
    else:
        mask_NBX = (k_BX < K)[None, :, :] & (row_N >= 0)[:, None, None]
        return tl.load(ptrs_NBX, mask=mask_NBX, other=0.0, eviction_policy="evict_first")


@triton.jit
def scaled_row(
    x_ptr, x_scales_ptr, x_scales_stride, scales_ptr, first_block, K,
    BLOCKS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One row's values [B, X], FP32, times its own scales and those of the weights' row of blocks."""
    block_B = first_block + tl.arange(0, BLOCKS)
    k_BX = block_B[:, None] * 128 + tl.arange(0, 128)[None, :]
    if EVEN_K:
        x_BX = e4m3.decode(tl.load(x_ptr + k_BX))
        scale_B = tl.load(scales_ptr + block_B)
        if QUANTISED:
            scale_B *= tl.load(x_scales_ptr + block_B * x_scales_stride)
    else:
        x_BX = e4m3.decode(tl.load(x_ptr + k_BX, mask=k_BX < K, other=0.0))
        scale_B = tl.load(scales_ptr + block_B, mask=block_B * 128 < K, other=0.0)
        if QUANTISED:
            scale_B *= tl.load(x_scales_ptr + block_B * x_scales_stride, mask=block_B * 128 < K, other=0.0)
    return x_BX * scale_B[:, None]


@triton.jit
def multi_row_product(
    acc_NM, x_ptr, x_row_M, x_valid_M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride,
    w_ptr, row_N, w_stride, scales_ptr, first_block, last_block, K,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc_NM`` plus W x^T over the blocks given. Each block's product is added to it in FP32."""
    k_X = tl.arange(0, 128)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        k = block * 128
        x_mask_MX = x_valid_M[:, None] & (k + k_X < K)[None, :]
        x_MX = tl.load(x_ptr + (x_row_M * x_stride)[:, None] + (k + k_X)[None, :], mask=x_mask_MX, other=0.0)
        w_ptrs_NX = w_ptr + (row_N * w_stride)[:, None] + (k + k_X)[None, :]
        if EVEN_K:
            w_NX = tl.load(w_ptrs_NX)
        else:
            w_NX = tl.load(w_ptrs_NX, mask=(row_N >= 0)[:, None] & (k + k_X < K)[None, :], other=0.0)
        scale = tl.load(scales_ptr + block)
        if QUANTISED:
            part_NM = tl.dot(w_NX, tl.trans(x_MX))
            x_scale_M = tl.load(
                x_scales_ptr + x_row_M * x_scales_row_stride + block * x_scales_stride, mask=x_valid_M, other=0.0
            )
            acc_NM += part_NM * (x_scale_M * scale)[None, :]
        else:
            part_NM = tl.dot(e4m3.decode(w_NX).to(tl.bfloat16), tl.trans(x_MX))
            acc_NM += part_NM * scale
    return acc_NM


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
