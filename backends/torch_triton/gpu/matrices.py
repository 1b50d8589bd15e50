"""FP8 matrices on a device: codes with one scale per 128 x 128 block, made, padded and cut between blocks.

Shape letters: N rows (out), K columns (in), R x C blocks. Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.quant import block_grid
from ..kernels.chips import chip_of
from ..kernels.quant import E4M3_MAX, GROUP


class Fp8Matrix(NamedTuple):
    codes: Tensor  # [N, K] in the chip's FP8 type
    scales: Tensor  # [R, C] float32


def whole_blocks(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // GROUP) * GROUP


def pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``matrix`` with zeros below and to the right, up to the given size; bytes travel as uint8."""
    missing = 0, columns - matrix.shape[1], 0, rows - matrix.shape[0]
    if not any(missing):
        return matrix
    return (
        F.pad(matrix.view(torch.uint8), missing).view(matrix.dtype) if matrix.itemsize == 1 else F.pad(matrix, missing)
    )


def pad_fp8(matrix: Fp8Matrix, rows: int, columns: int) -> Fp8Matrix:
    """Padded codes are zero, and so are the scales of blocks that are all padding."""
    scales = pad(matrix.scales, *block_grid((rows, columns)))
    return Fp8Matrix(pad(matrix.codes, rows, columns).contiguous(), scales.contiguous())


def below(matrices: list[Fp8Matrix]) -> Fp8Matrix:
    """Matrices one below the other; all but the last must have whole blocks of rows."""
    assert all(len(matrix.codes) % GROUP == 0 for matrix in matrices[:-1]), "scales would not fit their rows"
    codes = torch.cat([matrix.codes.view(torch.uint8) for matrix in matrices]).view(matrices[0].codes.dtype)
    return Fp8Matrix(codes, torch.cat([matrix.scales for matrix in matrices]))


def quantise_blocks(weight_NK: Tensor) -> Fp8Matrix:
    """`models.quantise.quantise_fp8_blocks` on the weight's device."""
    rows, columns = weight_NK.shape
    padded = pad(weight_NK.float(), whole_blocks(rows), whole_blocks(columns))
    blocks_RXCX = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    amax_RC = blocks_RXCX.abs().amax((1, 3))
    scales_RC = (amax_RC / E4M3_MAX).clamp(min=2.0**-126).masked_fill(amax_RC == 0, 1.0)
    quotients = (blocks_RXCX / scales_RC[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).view(padded.shape)
    return of_e4m3fn(quotients[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales_RC)


def of_e4m3fn(codes_NK: Tensor, scales_RC: Tensor) -> Fp8Matrix:
    """The same numbers in the chip's FP8 type: an fnuz code means half as much and 0x80 is NaN there, not -0."""
    if chip_of(codes_NK.device).fp8 == codes_NK.dtype:
        return Fp8Matrix(codes_NK, scales_RC)
    bits = codes_NK.view(torch.uint8)
    return Fp8Matrix(bits.masked_fill(bits == 0x80, 0).view(chip_of(codes_NK.device).fp8), 2 * scales_RC)


def dequantise_blocks(matrix: Fp8Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, K], rounded once."""
    rows, columns = matrix.codes.shape
    spread_NK = matrix.scales.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]
    return (matrix.codes.float() * spread_NK).to(dtype)
