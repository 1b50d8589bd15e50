"""kv_b_proj for few tokens, which is bound by its bytes: BF16, or the FP8 codes that a checkpoint stores.

Codes times their scales, rounded to BF16, are the numbers that many tokens are multiplied with, too: a request does not
see which of the two it got.

Shape letters: H heads, Y rows of a head (N of keys, then V of values), C latent (kv_lora_rank), R rows of a tile,
J columns of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import e4m3
from .chips import Chip, check
from .quant import GROUP
from .sizes import power_of_2
from .weights import Fp8Weight, dequantise_weight

FEW_TOKENS = 8  # up to here our kernels are faster than a library's products


class KvB(NamedTuple):
    """``matrix``: [H Y, C], BF16 or FP8."""

    matrix: torch.Tensor | Fp8Weight
    heads: int

    @property
    def rows(self) -> int:
        """Y."""
        return self.codes.shape[0] // self.heads

    @property
    def latent(self) -> int:
        return self.codes.shape[1]

    @property
    def codes(self) -> torch.Tensor:
        """Or values."""
        return self.matrix.codes if isinstance(self.matrix, Fp8Weight) else self.matrix

    def in_block(self, first: int, rows: int, columns: int) -> bool:
        """Whether tiles of so many rows, from the same row of every head on, and columns are as IN_BLOCK says."""
        whole = self.rows % GROUP == 0 and columns % GROUP == 0 and self.latent % columns == 0
        return whole and first % GROUP == 0 and rows == GROUP

    def plain(self) -> torch.Tensor:
        """BF16 [H, Y, C]."""
        matrix = self.matrix
        values = dequantise_weight(matrix).bfloat16() if isinstance(matrix, Fp8Weight) else matrix
        return values.view(self.heads, -1, self.latent)

    def arguments(self, chip: Chip) -> tuple[torch.Tensor | int | None, ...]:
        """Of a kernel: the matrix, its row stride, and the same of scales."""
        codes = self.codes
        if not isinstance(self.matrix, Fp8Weight):
            return codes, codes.stride(0), None, 0
        codes = codes if chip.fp8_units else codes.view(torch.uint8)
        return codes, codes.stride(0), self.matrix.scales, self.matrix.scales.stride(0)


def columns_of_piece(latent: int, chip: Chip) -> int:
    """Columns that a program works on at a time: all, where it has memory for them and no power of two is missed."""
    whole = max(16, power_of_2(latent))
    fits = whole == latent and whole <= (512 if chip.shared_memory >= 160 << 10 else GROUP)
    return whole if fits else min(whole, GROUP)


def check_kv_b(weights: KvB, heads: int, latent: int, kernel: str) -> None:
    codes = weights.codes
    fits = weights.heads == heads and weights.latent == latent and len(codes) == heads * weights.rows
    check(fits and codes.stride(1) == 1, f"kv_b {tuple(codes.shape)} for {heads} heads", kernel)


@triton.jit
def head_rows(
    w_ptr, w_stride, scales_ptr, scales_stride, first, R: tl.constexpr, rows, column, J: tl.constexpr, C: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):  # fmt: skip
    """BF16 [R, J]: rows from ``first`` on, columns from ``column`` on; zeros from ``rows`` and C on.

    IN_BLOCK: all are there, rows of one row of scale blocks, columns of whole blocks.
    """
    row_R = first + tl.arange(0, R)
    c_J = column + tl.arange(0, J)
    w_ptrs_RJ = w_ptr + (row_R * w_stride)[:, None] + c_J[None, :]
    mask_RJ = (tl.arange(0, R) < rows)[:, None] & (c_J < C)[None, :]
    w_RJ = tl.load(w_ptrs_RJ) if IN_BLOCK else tl.load(w_ptrs_RJ, mask=mask_RJ, other=0.0)
    if scales_ptr is not None:
        if IN_BLOCK:
            g_G = column // 128 + tl.arange(0, J // 128)
            scale_G = tl.load(scales_ptr + first // 128 * scales_stride + g_G)
            scale_RJ = tl.reshape(tl.broadcast_to(scale_G[:, None], (J // 128, 128)), (J,))[None, :]
        else:
            scale_ptrs_RJ = scales_ptr + (row_R // 128 * scales_stride)[:, None] + (c_J // 128)[None, :]
            scale_RJ = tl.load(scale_ptrs_RJ, mask=mask_RJ, other=0.0)
        w_RJ = (e4m3.decode(w_RJ) * scale_RJ).to(tl.bfloat16)
    return w_RJ
