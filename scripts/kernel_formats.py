"""Random weights and activations in every format that `kernel_cases` times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspan.backends.torch_triton.kernels import int8, quant
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight, Int4Weight, Int8Weight, Weight, words_of

FP8 = torch.float8_e4m3fn


def random_codes(device: torch.device, *shape: int) -> Tensor:
    """Random e4m3 codes of all magnitudes up to 240, none NaN."""
    raw = torch.randint(0, 240, shape, dtype=torch.uint8, device=device)
    return raw.add_((raw >= 120).to(torch.uint8).mul_(8)).view(FP8)


def random_scales(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, device=device) * 1e-3


def random_rows(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


class Kind(NamedTuple):
    """A format: random matrices [*shape], or stacks of them, and BF16 activations as it takes them."""

    weight: Callable[..., Weight]
    operand: Callable[[Tensor], quant.Codes | Tensor]


def _fp8(device: torch.device, *shape: int) -> Fp8Weight:
    *stack, outputs, inputs = shape
    return Fp8Weight(random_codes(device, *shape), random_scales(device, *stack, -(-outputs // 128), inputs // 128))


def _int8(device: torch.device, *shape: int) -> Int8Weight:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return Int8Weight(codes, random_scales(device, *shape[:-1]))


def _int4(device: torch.device, *shape: int) -> Int4Weight:
    """Groups of 128, as most checkpoints have."""
    *stack, outputs, inputs = shape
    blocks = *stack, inputs // 128, outputs, 32
    words = torch.randint(-(1 << 15), 1 << 15, blocks, dtype=torch.int16, device=device)
    zeros = torch.randint(0, 16, (*stack, inputs // 128, outputs), device=device)
    return Int4Weight(words, words_of(random_scales(device, *zeros.shape), zeros), inputs)


FP8_KIND = Kind(_fp8, quant.quantise)
INT8_KIND = Kind(_int8, int8.quantise_rows)
INT4_KIND = Kind(_int4, lambda x: x)


def bytes_of(weight: Weight) -> int:
    """Codes and scales."""
    return weight.codes.nbytes + weight.scales.nbytes


def bytes_of_value(x: quant.Codes | Tensor) -> int:
    return x.codes.itemsize if isinstance(x, quant.Codes) else x.itemsize
