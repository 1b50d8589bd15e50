"""Products of FP8 weight tiles, as functions for kernels: one row on the vector units, several on the matrix units.

Weights [N, K] have one scale per 128 x 128 block, activations one per row and 128 channels; partial blocks at the right
and lower edges are legal. Weights lie in the chip's FP8 type, or as e4m3fn bytes where it has no FP8 units, and each
byte is read once. A tile's rows never cross a row of blocks; gate and up rows of a gated product are one tile, so that
one pass over the activations serves both.

Shape letters: A matrices side by side (1, or gate and up), N weight rows of a tile, M activation rows of a tile,
X 128 channels, G groups of Y channels.

In the one-row product a thread loads 16 bytes, one group: Y is 16 for FP8 rows and 8 for BF16 ones, whose
16 bytes set the layout. G is meant to equal the threads of a program: then each keeps its piece of the row in registers
for all weight rows, and nothing passes between threads but the final sum. G is the first dimension so that a warp's
threads lie along it.
"""

import triton
import triton.language as tl

from . import e4m3, pdl


@triton.jit
def _columns(first_block, last_block, K, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, EVEN_K: tl.constexpr):
    """Channels [G, Y] of ``BLOCKS`` blocks, which of them lie before ``last_block`` and K, and their blocks [G]."""
    PER_BLOCK: tl.constexpr = 128 // VECTOR
    group_G = first_block * PER_BLOCK + tl.arange(0, BLOCKS * PER_BLOCK)
    k_GY = group_G[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    mask_GY = tl.broadcast_to((group_G < last_block * PER_BLOCK)[:, None], k_GY.shape)
    if not EVEN_K:
        mask_GY &= k_GY < K
    return k_GY, mask_GY, group_G // PER_BLOCK


@triton.jit
def weight_tile(
    w_ptr, row_AN, w_stride, first_block, last_block, K,
    BLOCKS: tl.constexpr, VECTOR: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Codes [G, A, N, Y] of blocks from ``first_block``, zero from ``last_block`` on."""
    k_GY, mask_GY, _ = _columns(first_block, last_block, K, BLOCKS, VECTOR, EVEN_K)
    ptrs_GANY = w_ptr + (row_AN * w_stride)[None, :, :, None] + k_GY[:, None, None, :]
    return tl.load(ptrs_GANY, mask=mask_GY[:, None, None, :], other=0.0)


@triton.jit
def add_product(
    acc_GAN, w_GANY, x_ptr, x_scales_ptr, x_scales_stride, scales_ptr, scale_row, up_scale_row, scales_stride,
    first_block, last_block, K, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``acc_GAN`` plus a weight tile times one row of x. A thread's Y channels share their scales."""
    k_GY, mask_GY, block_G = _columns(first_block, last_block, K, BLOCKS, VECTOR, EVEN_K)
    x_GY = e4m3.decode(tl.load(x_ptr + k_GY, mask=mask_GY, other=0.0))
    inside_G = block_G < last_block
    scale_G = tl.load(scales_ptr + scale_row * scales_stride + block_G, mask=inside_G, other=0.0)
    if QUANTISED:
        x_scale_G = tl.load(x_scales_ptr + block_G * x_scales_stride, mask=inside_G, other=0.0)
        scale_G *= x_scale_G
    scale_GA = scale_G[:, None]
    if GATED:
        up_scale_G = tl.load(scales_ptr + up_scale_row * scales_stride + block_G, mask=inside_G, other=0.0)
        if QUANTISED:
            up_scale_G *= x_scale_G
        scale_GA = tl.where(tl.arange(0, 2)[None, :] == 0, scale_GA, up_scale_G[:, None])
    return acc_GAN + tl.sum(e4m3.decode(w_GANY) * x_GY[:, None, None, :], 3) * scale_GA[:, :, None]


@triton.jit
def one_row_product(
    x_ptr, x_scales_ptr, x_scales_stride, w_ptr, row_AN, w_stride, scales_ptr, scale_row, up_scale_row, scales_stride,
    first_block, last_block, K, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W x over the blocks given, [A, N] FP32.

    The first weights are asked for before `pdl.wait`, the next ones before the use of those that are there.
    """
    acc_GAN = tl.zeros((BLOCKS * (128 // VECTOR), row_AN.shape[0], row_AN.shape[1]), tl.float32)
    w_GANY = weight_tile(w_ptr, row_AN, w_stride, first_block, last_block, K, BLOCKS, VECTOR, EVEN_K)
    pdl.wait(PDL)
    pdl.release(PDL)
    for block in range(first_block, last_block, BLOCKS):
        next_GANY = weight_tile(w_ptr, row_AN, w_stride, block + BLOCKS, last_block, K, BLOCKS, VECTOR, EVEN_K)
        acc_GAN = add_product(
            acc_GAN, w_GANY, x_ptr, x_scales_ptr, x_scales_stride, scales_ptr, scale_row, up_scale_row, scales_stride,
            block, last_block, K, BLOCKS, VECTOR, GATED, QUANTISED, EVEN_K,
        )  # fmt: skip
        w_GANY = next_GANY
    return tl.sum(acc_GAN, 0)


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
