"""Matrices of linear layers on a device, in every format: made, padded, moved, and put into stacks.

`kernels.weights` says how quantised ones lie. Shape letters: N rows (out), K columns (in), R x C blocks of 128 x 128,
E matrices of a stack. Source of FP8 blocks: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.quant import block_grid
from ..kernels.chips import chip_of
from ..kernels.quant import E4M3_MAX, GROUP, divided
from ..kernels.weights import Fp8Weight, Int4Weight, Int8Weight


class Bf16Weight(NamedTuple):
    codes: Tensor  # [N, K]


M = TypeVar("M", Bf16Weight, Fp8Weight, Int8Weight, Int4Weight)
Reorder = Callable[[Tensor], Tensor]


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


def below(parts: list[Tensor]) -> Tensor:
    """Matrices, or vectors, one below the other; bytes travel as uint8."""
    if parts[0].itemsize == 1:
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def room_for(count: int, matrix: M) -> M:
    """An empty stack of ``count`` such matrices."""
    parts: dict[str, Any] = matrix._asdict()
    rooms: dict[str, Any] = {
        name: part.new_empty(count, *part.shape) for name, part in parts.items() if isinstance(part, Tensor)
    }
    return matrix._replace(**rooms)


def put(stack: M, number: int, matrix: M) -> None:
    """Make ``matrix`` one of the stack."""
    for places, part in zip(stack, matrix, strict=True):
        if isinstance(places, Tensor):
            assert isinstance(part, Tensor), "matrices of a stack are alike"
            places[number].copy_(part)


# FP8 blocks ---------------------------------------------------------------------------------------------------------


def quantise_blocks(weight_NK: Tensor) -> Fp8Weight:
    """`models.quantise.quantise_fp8_blocks` on the weight's device."""
    quotients_NK, scales_RC = _by_blocks(weight_NK, E4M3_MAX)
    codes_NK = quotients_NK.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return of_e4m3fn(codes_NK.contiguous(), scales_RC)


def _by_blocks(weight_NK: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Weights divided by the scales of their blocks, whose largest become ``limit``, and these scales."""
    rows, columns = weight_NK.shape
    padded = pad(weight_NK.float(), whole_blocks(rows), whole_blocks(columns))
    blocks_RXCX = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    scales_RC = _scales(blocks_RXCX.abs().amax((1, 3)), limit)
    quotients = (blocks_RXCX / scales_RC[:, None, :, None]).view(padded.shape)
    return quotients[:rows, :columns], scales_RC


def _scales(amax: Tensor, limit: float) -> Tensor:
    return divided(amax, limit).clamp(min=2.0**-126).masked_fill(amax == 0, 1.0)


def of_e4m3fn(codes_NK: Tensor, scales_RC: Tensor) -> Fp8Weight:
    """The same numbers in the chip's FP8 type: an fnuz code means half as much and 0x80 is NaN there, not -0."""
    if chip_of(codes_NK.device).fp8 == codes_NK.dtype:
        return Fp8Weight(codes_NK, scales_RC)
    bits = codes_NK.view(torch.uint8)
    return Fp8Weight(bits.masked_fill(bits == 0x80, 0).view(chip_of(codes_NK.device).fp8), 2 * scales_RC)


def pad_fp8(matrix: Fp8Weight, rows: int, columns: int) -> Fp8Weight:
    """Padded codes are zero, and so are the scales of blocks that are all padding."""
    scales = pad(matrix.scales, *block_grid((rows, columns)))
    return Fp8Weight(pad(matrix.codes, rows, columns).contiguous(), scales.contiguous())


# INT8 ---------------------------------------------------------------------------------------------------------------


def quantise_channels(weight_NK: Tensor) -> Int8Weight:
    """`models.quantise.quantise_int8_channels` on the weight's device."""
    scales_N = _scales(weight_NK.float().abs().amax(1), 127)
    return Int8Weight((weight_NK.float() / scales_N[:, None]).round().clamp(-127, 127).to(torch.int8), scales_N)


def quantise_int8_blocks(weight_NK: Tensor) -> Int8Weight:
    """`models.quantise.quantise_int8_blocks` on the weight's device."""
    quotients_NK, scales_RC = _by_blocks(weight_NK, 127)
    return Int8Weight(quotients_NK.round().clamp(-127, 127).to(torch.int8).contiguous(), scales_RC)


def pad_int8(matrix: Int8Weight, rows: int, columns: int) -> Int8Weight:
    codes = pad(matrix.codes, rows, columns).contiguous()
    if matrix.has_blocks:
        return Int8Weight(codes, pad(matrix.scales, *block_grid((rows, columns))).contiguous())
    return Int8Weight(codes, F.pad(matrix.scales, (0, rows - len(matrix.scales))))
