"""Products of FP8 weight tiles, as functions for kernels: one row on the vector units, several on the matrix units.

Weights [N, K] have one scale per 128 x 128 block, activations one per row and 128 channels; partial blocks at the right
and lower edges are legal. Weights lie in the chip's FP8 type, or as e4m3fn bytes where it has no FP8 units, and each
byte is read once. A tile's rows never cross a row of blocks; gate and up rows of a gated product are one tile, so that
one pass over the activations serves both.

Shape letters: A matrices side by side (1, or gate and up), N weight rows of a tile, M activation rows of a tile,
X 128 channels, G groups of 16 channels (one thread's load), Y 16 channels.
"""

import triton
import triton.language as tl

from . import e4m3, pdl


@triton.jit
def weight_tile(w_ptr, row_AN, w_stride, first_block, last_block, K, BLOCKS: tl.constexpr, EVEN_K: tl.constexpr):
    """Codes [A, N, G, Y] of blocks from ``first_block``, zero from ``last_block`` on."""
    group_G = first_block * 8 + tl.arange(0, BLOCKS * 8)
    k_GY = group_G[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask_GY = tl.broadcast_to((group_G < last_block * 8)[:, None], k_GY.shape)
    if not EVEN_K:
        mask_GY &= k_GY < K
    ptrs_ANGY = w_ptr + (row_AN * w_stride)[:, :, None, None] + k_GY[None, None, :, :]
    return tl.load(ptrs_ANGY, mask=mask_GY[None, None, :, :], other=0.0)


@triton.jit
def scaled_row(
    x_ptr, x_scales_ptr, x_scales_stride, scales_ptr, scale_row_A, scales_stride, first_block, last_block, K,
    BLOCKS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One row's values, FP32, times its own scales and those of the weights: [A, G, Y]."""
    group_G = first_block * 8 + tl.arange(0, BLOCKS * 8)
    k_GY = group_G[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside_G = group_G < last_block * 8
    mask_GY = tl.broadcast_to(inside_G[:, None], k_GY.shape)
    if not EVEN_K:
        mask_GY &= k_GY < K
    x_GY = e4m3.decode(tl.load(x_ptr + k_GY, mask=mask_GY, other=0.0))
    scale_ptrs_AG = scales_ptr + (scale_row_A * scales_stride)[:, None] + (group_G // 8)[None, :]
    scale_AG = tl.load(scale_ptrs_AG, mask=inside_G[None, :], other=0.0)
    if QUANTISED:
        x_scale_G = tl.load(x_scales_ptr + group_G // 8 * x_scales_stride, mask=inside_G, other=0.0)
        scale_AG *= x_scale_G[None, :]
    return x_GY[None, :, :] * scale_AG[:, :, None]


@triton.jit
def one_row_product(
    x_ptr, x_scales_ptr, x_scales_stride, w_ptr, row_AN, w_stride, scales_ptr, scale_row_A, scales_stride,
    first_block, last_block, K, BLOCKS: tl.constexpr, STAGES: tl.constexpr, QUANTISED: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W x over the blocks given, [A, N] FP32. The first weights are asked for before `pdl.wait`."""
    acc_ANG = tl.zeros((row_AN.shape[0], row_AN.shape[1], BLOCKS * 8), tl.float32)
    if STAGES == 1:
        w_ANGY = weight_tile(w_ptr, row_AN, w_stride, first_block, last_block, K, BLOCKS, EVEN_K)
    pdl.wait(PDL)
    pdl.release(PDL)
    for block in tl.range(first_block, last_block, BLOCKS, num_stages=STAGES):
        if STAGES == 1:
            next_ANGY = weight_tile(w_ptr, row_AN, w_stride, block + BLOCKS, last_block, K, BLOCKS, EVEN_K)
        else:
            w_ANGY = weight_tile(w_ptr, row_AN, w_stride, block, last_block, K, BLOCKS, EVEN_K)
        x_AGY = scaled_row(
            x_ptr, x_scales_ptr, x_scales_stride, scales_ptr, scale_row_A, scales_stride, block, last_block, K,
            BLOCKS, QUANTISED, EVEN_K,
        )  # fmt: skip
        acc_ANG += tl.sum(e4m3.decode(w_ANGY) * x_AGY[:, None, :, :], 3)  # 16 products of one thread
        if STAGES == 1:
            w_ANGY = next_ANGY
    return tl.sum(acc_ANG, 2)


@triton.jit
def rows_product(
    acc_NM, x_ptr, x_row_M, x_valid_M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride,
    w_ptr, row_N, w_stride, scales_ptr, scale_row_N, scales_stride, first_block, last_block, K,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc_NM`` plus W x^T over the blocks given. Each block's product is added to it in FP32."""
    x = tl.arange(0, 128)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        k_X = block * 128 + x
        x_ptrs_MX = x_ptr + (x_row_M * x_stride)[:, None] + k_X[None, :]
        w_ptrs_NX = w_ptr + (row_N * w_stride)[:, None] + k_X[None, :]
        if EVEN_K:
            x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None], other=0.0)
            w_NX = tl.load(w_ptrs_NX)
        else:
            x_MX = tl.load(x_ptrs_MX, mask=x_valid_M[:, None] & (k_X < K)[None, :], other=0.0)
            w_NX = tl.load(w_ptrs_NX, mask=tl.broadcast_to((k_X < K)[None, :], w_ptrs_NX.shape), other=0.0)
        scale_N = tl.load(scales_ptr + scale_row_N * scales_stride + block)
        if QUANTISED:
            x_scale_ptrs_M = x_scales_ptr + x_row_M * x_scales_row_stride + block * x_scales_stride
            x_scale_M = tl.load(x_scale_ptrs_M, mask=x_valid_M, other=0.0)
            acc_NM += tl.dot(w_NX, tl.trans(x_MX)) * (scale_N[:, None] * x_scale_M[None, :])
        else:
            acc_NM += tl.dot(e4m3.decode(w_NX).to(tl.bfloat16), tl.trans(x_MX)) * scale_N[:, None]
    return acc_NM


@triton.jit
def silu_product(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up
