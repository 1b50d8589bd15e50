"""An INT4 matrix in BF16, for products of many rows: a library multiplies that faster than weights are decoded tile by
tile for every tile of rows.

Shape letters: N rows, K columns, J rows of a tile, X channels of a group in a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import int4, pdl
from .chips import check, chip_of, options
from .quant import GROUP
from .sizes import cdiv
from .weights import Int4Weight

_BLOCK_N = 64


@triton.jit
def _decoded(
    w_ptr, block_stride, scales_ptr, scales_stride, order_ptr, out_ptr, N, K, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, blocks of K."""
    pdl.wait(PDL)
    pdl.release(PDL)
    j_J = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_J = tl.minimum(j_J, N - 1).to(tl.int64)
    block = tl.program_id(1)
    words_JX = tl.load(w_ptr + block.to(tl.int64) * block_stride + (row_J * 32)[:, None] + tl.arange(0, 32)[None, :])
    groups = int4.load_groups(scales_ptr + block * GROUPS * scales_stride + row_J, scales_stride, GROUPS)
    fields = int4.decode(words_JX, groups, INSTRUCTION)
    for group in tl.static_range(GROUPS):
        k_X = block * 128 + group * (128 // GROUPS) + tl.arange(0, 128 // GROUPS)
        column_X = k_X if order_ptr is None else tl.load(order_ptr + k_X)
        values_JX = int4.channels(fields, group, GROUPS).to(tl.float32) * int4.scale(groups, group, GROUPS)[:, None]
        mask_JX = (j_J < N)[:, None] & (column_X < K)[None, :]
        tl.store(out_ptr + (row_J * K)[:, None] + column_X[None, :], values_JX, mask=mask_JX)


def decoded(weight: Int4Weight) -> torch.Tensor:
    """BF16 [N, K], rounded to nearest even."""
    codes, scales = weight.codes, weight.scales
    name = "decoded"
    check(codes.dtype == torch.int16 and codes.dim() == 3, f"codes {codes.dtype} {tuple(codes.shape)}", name)
    check(codes.stride()[1:] == (32, 1) and scales.stride(1) == 1, "blocks must be contiguous", name)
    rows = codes.shape[1]
    chip = chip_of(codes.device)
    out_NK = torch.empty(rows, weight.inputs, dtype=torch.bfloat16, device=codes.device)
    _decoded[(cdiv(rows, _BLOCK_N), cdiv(weight.inputs, GROUP))](
        codes, codes.stride(0), scales, scales.stride(0), weight.order, out_NK, rows, weight.inputs,
        GROUPS=GROUP // weight.group, BLOCK_N=_BLOCK_N, INSTRUCTION=chip.name.startswith("sm_"),
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out_NK
