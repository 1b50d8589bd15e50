"""Quantised matrices as kernels read them, and as arguments of their launches.

A matrix [N, K] may be one of a stack: every tensor then has a leading axis E. All scales multiply.

- FP8: e4m3 codes in the chip's form, a scale for each block of 128 x 128; partial blocks at the edges are legal.
- INT8: signed codes, a scale for each row, or for each block of 128 x 128.
- INT4: (code - zero point) * scale, both for a group of 32, 64 or 128 channels of a row. Channels lie in blocks of 128,
  of 32 words of 16 bits: word h holds channels h, 32 + h, 64 + h and 96 + h, the first in the lowest bits. The same
  field of a tile of words is then a tile of neighbouring channels, and two words side by side are decoded at once, in
  the registers from which matrix units take them. A group's scale and zero point are one word of 32 bits, which can be
  copied to shared memory in the background: the upper 24 bits of the FP32 scale (exact for scales that are stored in
  F16 or BF16) above 128 + zero point. All rows of a block lie together, and so do all of a group: a tile of rows reads
  one piece of memory instead of 64 bytes of each row. ``order`` says where the input of each channel is: GPTQ with
  act-order sorts channels into groups.

Shape letters: N rows (out), K columns (in), R x C blocks, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chips import Chip, check
from .sizes import cdiv

GROUP = 128


class Fp8Weight(NamedTuple):
    codes: Tensor  # [N, K] in the chip's FP8 type
    scales: Tensor  # [R, C] float32


class Int8Weight(NamedTuple):
    codes: Tensor  # [N, K] int8
    scales: Tensor  # float32: [N], or [R, C] of blocks

    @property
    def has_blocks(self) -> bool:
        return self.scales.dim() == self.codes.dim()


class Int4Weight(NamedTuple):
    codes: Tensor  # [C, N, 32] int16, C blocks
    scales: Tensor  # [G, N] int32 words of scale and zero point, for whole blocks
    inputs: int  # K
    order: Tensor | None = None  # [128 C] int32

    @property
    def group(self) -> int:
        return GROUP * self.codes.shape[-3] // self.scales.shape[-2]


Weight = Fp8Weight | Int8Weight | Int4Weight


class Arguments(NamedTuple):
    """Of a kernel: codes, the strides of a matrix and of a row; the same of scales; order. INT4 has strides of blocks
    and groups instead of rows."""

    pointers: tuple[Tensor | int | None, ...]
    constants: dict[str, Any]


def inputs_of(weight: Weight) -> int:
    """K."""
    return weight.inputs if isinstance(weight, Int4Weight) else weight.codes.shape[-1]


def arguments(weight: Weight, chip: Chip) -> Arguments:
    """How kernels take ``weight``: a matrix, or a stack."""
    codes, scales = weight.codes, weight.scales
    order, groups, axes = None, 1, codes.dim()
    if isinstance(weight, Fp8Weight):
        kind = "fp8"
        codes = codes if chip.fp8_units else codes.view(torch.uint8)
    elif isinstance(weight, Int8Weight):
        kind = "int8 blocks" if weight.has_blocks else "int8"
    else:
        kind, order, groups, axes = "int4", weight.order, GROUP // weight.group, axes - 1
    of_matrix = (codes.stride(0), scales.stride(0)) if axes == 3 else (0, 0)
    row = codes.stride(-3 if kind == "int4" else -2)
    row_of_scales = scales.stride(-2) if scales.dim() == axes else 0
    constants = {
        "KIND": kind,
        "GROUPS": groups,
        "EVEN_K": inputs_of(weight) % GROUP == 0,
        "INSTRUCTION": chip.name.startswith("sm_"),
    }
    return Arguments((codes, of_matrix[0], row, scales, of_matrix[1], row_of_scales, order), constants)


def check_weight(weight: Weight, x: Tensor, chip: Chip, kernel: str) -> None:
    """What a launcher cannot take of a matrix, or of a stack, and of the activations' codes or BF16 values ``x``."""
    codes, scales = weight.codes, weight.scales
    shape = tuple(codes.shape)
    check(x.shape[1] == inputs_of(weight), f"activations {tuple(x.shape)} for weights {shape}", kernel)
    check(x.stride(1) == 1 and codes.stride(-1) == 1 and scales.stride(-1) == 1, "channels must be contiguous", kernel)
    grid = (*shape[:-2], *(cdiv(size, GROUP) for size in shape[-2:]))
    if isinstance(weight, Fp8Weight):
        wanted, takes = grid, (chip.fp8, torch.bfloat16) if chip.fp8_units else (torch.bfloat16,)
        check(codes.dtype == chip.fp8, f"weights in {codes.dtype}", kernel)
    elif isinstance(weight, Int8Weight):
        wanted, takes = grid if weight.has_blocks else shape[:-1], (torch.int8,)
        check(codes.dtype == torch.int8, f"weights in {codes.dtype}", kernel)
    else:
        channels = GROUP * shape[-3]
        wanted, takes = (*shape[:-3], channels // weight.group, shape[-2]), (torch.bfloat16,)
        check(codes.dtype == torch.int16 and weight.group in (32, 64, 128), f"groups of {weight.group}", kernel)
        fits = shape[-3] == cdiv(weight.inputs, GROUP) and shape[-1] == codes.stride(-2) == GROUP // 4
        check(fits and codes.stride(-3) * shape[-3] < 1 << 31, f"codes {shape}", kernel)
        order = weight.order
        fits = order is None or (order.is_contiguous() and order.shape == (*shape[:-3], channels))
        check(fits and (order is None or order.dtype == torch.int32), "order of another size", kernel)
    check(x.dtype in takes, f"{chip.name} takes no {x.dtype} activations for weights in {codes.dtype}", kernel)
    dtype = torch.int32 if isinstance(weight, Int4Weight) else torch.float32
    fits = scales.dtype == dtype and tuple(scales.shape) == wanted
    check(fits, f"{scales.dtype} scales {tuple(scales.shape)} for {wanted}", kernel)


def matrix_of(stack: Weight, expert: int) -> Weight:
    """A matrix of a stack."""
    if isinstance(stack, Int4Weight):
        order = None if stack.order is None else stack.order[expert]
        return Int4Weight(stack.codes[expert], stack.scales[expert], stack.inputs, order)
    return stack._replace(codes=stack.codes[expert], scales=stack.scales[expert])


def dequantise_weight(weight: Weight) -> Tensor:
    """The float32 matrix [N, K]."""
    if isinstance(weight, Int4Weight):
        return _dequantise_int4(weight)
    codes_NK, scales = weight.codes.float(), weight.scales
    if scales.dim() == 1:
        return codes_NK * scales[:, None]
    rows, columns = codes_NK.shape
    return codes_NK * scales.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]


def _dequantise_int4(weight: Int4Weight) -> Tensor:
    codes_NGX = int4_codes(weight.codes).unflatten(1, (-1, weight.group))
    scales_NG1, zeros_NG1 = (part.t()[:, :, None] for part in scale_and_zero(weight.scales))
    values_NGX = (codes_NGX.float() - zeros_NG1) * scales_NG1
    sorted_NK = values_NGX.flatten(1)[:, : weight.inputs]
    if weight.order is None:
        return sorted_NK
    return torch.empty_like(sorted_NK).index_copy_(1, weight.order[: weight.inputs].long(), sorted_NK)


def int4_words(codes_NK: Tensor) -> Tensor:
    """int16 words [C, N, 32] of codes 0 … 15 of whole blocks."""
    fields_NCFX = codes_NK.to(torch.int16).unflatten(1, (-1, 4, GROUP // 4))
    first, second, third, fourth = fields_NCFX.unbind(2)
    return (first | second << 4 | third << 8 | fourth << 12).transpose(0, 1).contiguous()


def int4_codes(words_CNX: Tensor) -> Tensor:
    """The inverse of `int4_words`."""
    words_NCX = words_CNX.transpose(0, 1)
    return torch.stack([words_NCX >> 4 * field & 15 for field in range(4)], 2).flatten(1)


def words_of(scales: Tensor, zeros: Tensor) -> Tensor:
    """int32 words of scales and of zero points 0 … 15; FP32 scales are rounded to 24 bits."""
    bits = scales.float().view(torch.int32)
    return ((bits + 0x7F + (bits >> 8 & 1)) & -256) | (128 + zeros.int())


def scale_and_zero(words: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales, and zero points as float32."""
    return (words & -256).view(torch.float32), ((words & 255) - 128).float()
