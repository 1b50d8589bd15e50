"""Logits of few rows in FP32 at the speed of memory: each row of the vocabulary's table is read once.

A library's products are tiled for many rows; of a part of the vocabulary, as a tensor-parallel rank has it, their tiles
leave processors idle.

Shape letters: M rows, V vocabulary, K channels, X channels of a step, J table rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import Chip, check, chip_of, options
from .sizes import cdiv, power_of_2

FEW_ROWS = 64
_TILE = 128


@triton.jit(do_not_specialize=["M"])
def _logits(
    x_ptr, x_stride, table_ptr, table_stride, out_ptr, M, V, K, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of V."""
    j_J = tl.program_id(0) * ROWS + tl.arange(0, BLOCK_J)
    valid_J = j_J < tl.minimum(V, tl.program_id(0) * ROWS + ROWS)
    m_M = tl.arange(0, BLOCK_M)
    table_ptr_J = table_ptr + j_J.to(tl.int64) * table_stride
    acc_JM = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
    pdl.wait(PDL)
    pdl.release(PDL)
    for k in tl.range(0, K, BLOCK_X, num_stages=STAGES):
        k_X = k + tl.arange(0, BLOCK_X)
        valid_X = k_X < K
        w_JX = tl.load(table_ptr_J[:, None] + k_X[None, :], mask=valid_J[:, None] & valid_X[None, :], other=0.0)
        x_ptrs_MX = x_ptr + (m_M * x_stride)[:, None] + k_X[None, :]
        x_MX = tl.load(x_ptrs_MX, mask=(m_M < M)[:, None] & valid_X[None, :], other=0.0)
        acc_JM = tl.dot(w_JX, tl.trans(x_MX), acc_JM)
    place_JM = (m_M.to(tl.int64) * V)[None, :] + j_J[:, None]
    tl.store(out_ptr + place_JM, acc_JM, mask=valid_J[:, None] & (m_M < M)[None, :])


class Config(NamedTuple):
    """``rows``: of the table in a tile; ``channels``: of a step."""

    rows: int
    channels: int
    stages: int


def choose(rows: int, vocabulary: int, chip: Chip) -> Config:
    """Whole waves of two programs on each processor; the fastest steps of a sweep on an H200."""
    room = 2 * chip.processors
    share = cdiv(vocabulary, room * cdiv(vocabulary, room * _TILE))
    if chip.shared_memory >= 200 << 10:
        return Config(share, 128, 3) if rows <= 16 else Config(share, 64, 6)
    return Config(share, 64, 3 if chip.shared_memory >= 160 << 10 else 2)


def logits(x_MK: torch.Tensor, table_VK: torch.Tensor, config: Config | None = None) -> torch.Tensor:
    """float32 [M, V] of up to `FEW_ROWS` rows; both BF16, channels contiguous."""
    name = "logits"
    (rows, channels), vocabulary = x_MK.shape, len(table_VK)
    check(rows <= FEW_ROWS and table_VK.shape[1] == channels, f"{tuple(x_MK.shape)} by {tuple(table_VK.shape)}", name)
    check(x_MK.dtype == table_VK.dtype == torch.bfloat16, f"{x_MK.dtype} by {table_VK.dtype}", name)
    check(x_MK.stride(1) == table_VK.stride(1) == 1, "channels must be contiguous", name)
    chip = chip_of(x_MK.device)
    config = config or choose(rows, vocabulary, chip)
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=x_MK.device)
    _logits[(cdiv(vocabulary, config.rows),)](
        x_MK, x_MK.stride(0), table_VK, table_VK.stride(0), out, rows, vocabulary, channels, ROWS=config.rows,
        BLOCK_J=max(16, power_of_2(config.rows)), BLOCK_M=max(16, power_of_2(rows)), BLOCK_X=config.channels,
        STAGES=config.stages, PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out
