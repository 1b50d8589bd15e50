"""FP8 blocks in PyTorch, with a gradient: what training rounds weights with and the checkpoint is written in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import BLOCK

FP8_MAX = 448.0


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., rows, columns] as e4m3 values of the same shape and float32 multipliers, one per 128 x 128 block."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)).clamp_min(1e-12) / FP8_MAX
    scaled = (weight.float() / _spread(scale, rows, columns)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def dequantise_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 weight of e4m3 values and their block multipliers."""
    return values.float() * _spread(scale, *values.shape[-2:])


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def rounded(weight: Tensor, to_fp8: bool) -> Tensor:
    """The weight as the checkpoint will hold it; gradients pass straight through to the float32 master."""
    if not to_fp8:
        return weight
    stored = dequantise_blocks(*quantise_blocks(weight.detach()))
    return weight + (stored - weight).detach()
