"""Activations to INT8 with one scale a row, as `models.quantise.quantise_activation_int8` defines it.

Shape letters: T tokens, K channels, X channels of a piece of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import check, chip_of, options
from .quant import Codes, empty_codes, int8_codes
from .sizes import cdiv, power_of_2

_PIECE = 8192  # channels of a row that are worked on at a time


@triton.jit
def _values(x_ptr, k_X, K, GATED: tl.constexpr):
    """FP32 [1, X]."""
    x_X = tl.load(x_ptr + k_X, mask=k_X < K, other=0.0).to(tl.float32)
    if GATED:
        up_X = tl.load(x_ptr + K + k_X, mask=k_X < K, other=0.0).to(tl.float32)
        x_X = tiles.silu_product(x_X, up_X).to(tl.bfloat16).to(tl.float32)
    return x_X[None, :]


@triton.jit
def _quantise_rows(
    x_ptr, x_stride, rows_ptr, codes_ptr, scales_ptr, K, GATED: tl.constexpr, INSTRUCTION: tl.constexpr,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. A row of one piece stays in registers between its two passes."""
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * x_stride
    k_X = tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.release(PDL)
    if tiles.is_past(t, rows_ptr):
        return
    first_1X = _values(x_ptr, k_X, K, GATED)
    amax_1 = tl.max(tl.abs(first_1X), 1)
    for piece in tl.static_range(1, PIECES):
        amax_1 = tl.maximum(amax_1, tl.max(tl.abs(_values(x_ptr, piece * BLOCK + k_X, K, GATED)), 1))
    scale_1 = tl.div_rn(tl.maximum(amax_1, 1e-10), 127.0)
    tl.store(scales_ptr + t + tl.arange(0, 1), scale_1)
    for piece in tl.static_range(PIECES):
        x_1X = first_1X if piece == 0 else _values(x_ptr, piece * BLOCK + k_X, K, GATED)
        place_1X = (piece * BLOCK + k_X)[None, :]
        tl.store(codes_ptr + t * K + place_1X, int8_codes(x_1X, scale_1, INSTRUCTION), mask=place_1X < K)


def quantise_rows(x_TK: torch.Tensor, gated: bool = False, rows_1: torch.Tensor | None = None) -> Codes:
    """INT8 codes of BF16 or FP32 activations [T, K], and their scales; channels contiguous.

    ``gated``, ``rows_1``: as in `quant.quantise`.
    """
    check(x_TK.dim() == 2 and x_TK.stride(1) == 1, "channels must be contiguous", "quantise_rows")
    chip = chip_of(x_TK.device)
    tokens, channels = x_TK.shape
    channels = channels // 2 if gated else channels
    out = empty_codes(tokens, channels, x_TK.device, "int8")
    block = min(_PIECE, power_of_2(channels))
    _quantise_rows[(tokens,)](
        x_TK, x_TK.stride(0), rows_1, *out, channels, GATED=gated, INSTRUCTION=chip.encodes_fp8, BLOCK=block,
        PIECES=cdiv(channels, block), PDL=chip.dependent_launch, **options(chip, warps=4 if block < 4096 else 8),
    )  # fmt: skip
    return out
