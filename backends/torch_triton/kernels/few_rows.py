"""Few rows times quantised weights, at the speed of memory: every weight byte is read once.

Where a matrix has too few rows to fill the chip, its columns are split; the last program of a tile to finish adds the
parts in their order, so the result does not depend on who was last.

Shape letters: M tokens, K inputs, N outputs, S splits of K, J weight rows of a tile.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3: 1 x 128 activations, FP32 promotion every 128 of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import Chip, check, chip_of, counters, options
from .quant import GROUP, Codes, dequantise
from .shares import even_share, gated_share
from .sizes import cdiv, power_of_2
from .weights import Int4Weight, Weight, arguments, check_weight, dequantise_weight


@triton.jit(do_not_specialize=["M", "x_scales_stride", "span"])
def _rows(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, w_ptr, w_stride_e, w_stride, scales_ptr,
    scales_stride_e, scales_stride, order_ptr, out_ptr, part_ptr, counter_ptr, M, N, K, span,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
    INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, splits of K, tiles of M. ``span``: blocks of K in a split."""
    n = tl.program_id(0) * ROWS
    n_N = n + tl.arange(0, BLOCK_N)
    row_J, scale_row_J = tiles.rows_of_tile(n, N, ROWS, BLOCK_N, GATED)
    valid_J = None if ROWS == BLOCK_N else tiles.used_places(ROWS, BLOCK_N, GATED)
    m_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_block = tl.program_id(1) * span
    last_block = tl.minimum(first_block + span, tl.cdiv(K, 128))
    pdl.wait(PDL)
    pdl.release(PDL)
    out_JM = tiles.rows_product(
        x_ptr, m_M, m_M < M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, w_ptr, row_J,
        valid_J, w_stride, scales_ptr, scale_row_J, scales_stride, order_ptr, first_block, last_block, K,
        KIND, GROUPS, QUANTISED, EVEN_K, INSTRUCTION, STAGES,
    )  # fmt: skip
    if GATED:
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(out_JM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        out_NM = tiles.silu_product(gate_NM, up_NM)
    else:
        out_NM = out_JM
    place_NM = (m_M.to(tl.int64) * N)[None, :] + n_N[:, None]
    mask_NM = (n_N < tl.minimum(N, n + ROWS))[:, None] & (m_M < M)[None, :]
    if SPLITS > 1:
        tl.store(part_ptr + tl.program_id(1).to(tl.int64) * M * N + place_NM, out_NM, mask=mask_NM)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tiles.is_last(counter_ptr + tile, SPLITS):
            sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for _ in tl.static_range(SPLITS):
                sum_NM += tl.load(part_ptr + place_NM, mask=mask_NM, other=0.0, cache_modifier=".cg")
                part_ptr += M * N
            tl.store(out_ptr + place_NM, sum_NM, mask=mask_NM)
    else:
        tl.store(out_ptr + place_NM, out_NM, mask=mask_NM)


class Config(NamedTuple):
    """``rows``: outputs of a tile; the tile is as large as the next power of two."""

    block_m: int
    rows: int
    splits: int
    warps: int
    stages: int


def choose(rows: int, outputs: int, inputs: int, gated: bool, chip: Chip, int4: bool = False) -> Config:
    """The fastest of sweeps on an H200: as many tiles as run at once, none in a second wave.

    Long rows: one program on each processor, with a pipeline so deep that no second one fits beside it: programs that
    start early go where there is room, and would leave processors idle. Short ones: two with a shallow one. Each with
    the same number of rows.
    """
    if int4 and chip.shared_memory >= 160 << 10:
        return _choose_int4(rows, outputs, inputs, gated, chip)
    block_m = min(64, max(16, power_of_2(rows)))
    few = block_m == 16
    deep, shallow = (7, 4) if chip.shared_memory >= 200 << 10 else (3, 3) if chip.shared_memory >= 160 << 10 else (2, 2)
    if gated:
        even = gated_share(outputs, 1, block_m, chip) if few and shallow == 4 else None
        share, stages = even or ((32, shallow) if few else (64, deep))
        return Config(block_m, share, 1, 4, stages)
    if inputs >= 8192:
        splits = max(1, chip.processors // cdiv(outputs, 128))
        if block_m == 64:  # even shares are slower here
            return Config(block_m, 128, splits, 4, min(6, deep))
        return Config(block_m, even_share(outputs, chip.processors // splits, 128) or 128, splits, 4, deep)
    programs = cdiv(outputs, 64)
    if programs > 2 * chip.processors and few:
        return Config(block_m, 128, 1, 4, shallow)
    splits = min(8 if few else 4, 2 * chip.processors // programs) if inputs >= 4096 else 1
    return Config(block_m, 64, max(1, splits), 4, shallow)


def _choose_int4(rows: int, outputs: int, inputs: int, gated: bool, chip: Chip) -> Config:
    """Decoding is work for many warps: the fastest of a sweep on an H200.

    With up to eight rows, products are those of single warps, which do not wait for each other.
    """
    few = rows <= 8
    block_m = 8 if few else min(64, power_of_2(rows))
    warps = 2 if few else 4
    if gated:
        even = even_share(outputs, 5 * chip.processors, 32) if few else None
        return Config(block_m, even or (32 if few else 64), 1, warps, 8 if even else 4)
    if few and inputs >= 8192:
        return Config(block_m, 64 if rows == 1 else even_share(outputs, chip.processors, 64) or 64, 8, warps, 4)
    tile = 128 if 8 < rows <= 32 and outputs >= 4096 else 64
    splits = (4 if few else 2) * chip.processors // cdiv(outputs, tile) if inputs >= 4096 else 1
    return Config(block_m, tile, max(1, min(8, splits)), warps, 4)


def few_rows(
    x: Codes | torch.Tensor, weight: Weight, gated: bool = False, config: Config | None = None
) -> torch.Tensor:
    """x W^T as BF16 [M, N].

    ``x``: what the weight takes. FP8 takes FP8 codes, or BF16 [M, K] (always so on a chip without FP8 units), INT8
    takes INT8 codes, INT4 takes BF16. ``gated``: W is [gate; up] and the result, half as wide, is silu(gate) * up.
    """
    name = "few_rows"
    values_MK = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values_MK.device)
    rows, inputs = values_MK.shape
    check_weight(weight, values_MK, chip, name)
    outputs = weight.codes.shape[-2] // 2 if gated else weight.codes.shape[-2]
    check(not gated or outputs % GROUP == 0, "gate and up rows must be whole blocks", name)
    config = config or choose(rows, outputs, inputs, gated, chip, isinstance(weight, Int4Weight))
    check(not gated or config.splits == 1, "a gated product cannot be split", name)
    device = values_MK.device
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=device)
    part, counter = None, None
    if config.splits > 1:
        part = torch.empty(config.splits, rows, outputs, dtype=torch.float32, device=device)
        counter = counters(device)
    x_scales, x_scales_strides = (x.scales, x.scales.stride()) if isinstance(x, Codes) else (None, (0, 0))
    pointers, constants = arguments(weight, chip)
    _rows[(cdiv(outputs, config.rows), config.splits, cdiv(rows, config.block_m))](
        values_MK, values_MK.stride(0), x_scales, *x_scales_strides, *pointers, out, part, counter, rows, outputs,
        inputs, cdiv(cdiv(inputs, GROUP), config.splits),
        BLOCK_M=config.block_m, ROWS=config.rows, BLOCK_N=power_of_2(config.rows), SPLITS=config.splits,
        STAGES=config.stages, GATED=gated, QUANTISED=isinstance(x, Codes), PDL=chip.dependent_launch, **constants,
        **options(chip, config.warps),
    )  # fmt: skip
    return out


def few_rows_eager(x: Codes | torch.Tensor, weight: Weight, gated: bool = False) -> torch.Tensor:
    """The twin of `few_rows`, FP32 [M, N]."""
    x_MK = dequantise(x) if isinstance(x, Codes) else x.float()
    out_MN = x_MK @ dequantise_weight(weight).t()
    if not gated:
        return out_MN
    gate_MN, up_MN = out_MN.chunk(2, dim=1)
    return torch.nn.functional.silu(gate_MN) * up_MN
