"""Few rows times FP8 weights with 128 x 128 scales, at the speed of memory: every weight byte is read once.

One row is a plain loop of load and multiply-add with many loads in flight; several rows go through the matrix units
with the weights as the left operand, so that a few tokens fill the narrow side. Where a matrix has too few rows to fill
the chip, its columns are split and FP32 partial results [M, S, N] go to the next kernel, which adds them in order.

Shape letters: M tokens, K inputs, N outputs, S splits of K, R x C blocks of 128 x 128.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3: 1 x 128 activations, FP32 promotion every 128 of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import Chip, check, chip_of, options
from .quant import GROUP, Codes, dequantise


@triton.jit
def _one_row(
    x_ptr, x_scales_ptr, x_scales_stride, w_ptr, w_stride, scales_ptr, scales_stride, out_ptr, N, K, span,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, GATED: tl.constexpr, QUANTISED: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, splits of K. ``span``: blocks of K in a split."""
    n = tl.program_id(0) * BLOCK_N
    n_N = n + tl.arange(0, BLOCK_N)
    row_AN = (tl.arange(0, 2 if GATED else 1) * N)[:, None] + tl.minimum(n_N, N - 1)[None, :]
    first_block = tl.program_id(1) * span
    last_block = tl.minimum(first_block + span, tl.cdiv(K, 128))
    out_AN = tiles.one_row_product(
        x_ptr, x_scales_ptr, x_scales_stride, w_ptr, row_AN.to(tl.int64), w_stride, scales_ptr, n // 128,
        (N + n) // 128, scales_stride, first_block, last_block, K, BLOCKS, VECTOR, GATED, QUANTISED, EVEN_K, PDL,
    )  # fmt: skip
    if GATED:
        gate_N, up_N = tl.split(tl.trans(out_AN))
        out_N = tiles.silu_product(gate_N, up_N)
    else:
        out_N = tl.sum(out_AN, 0)
    tl.store(out_ptr + tl.program_id(1) * N + n_N, out_N, mask=n_N < N)


@triton.jit
def _rows(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, w_ptr, w_stride, scales_ptr, scales_stride,
    out_ptr, M, N, K, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, splits of K, tiles of M."""
    n = tl.program_id(0) * BLOCK_N
    n_N = n + tl.arange(0, BLOCK_N)
    j_J = tl.arange(0, 2 * BLOCK_N if GATED else BLOCK_N)  # rows of this tile: gate's, then up's
    matrix_J = j_J // BLOCK_N * N
    row_J = matrix_J + tl.minimum(n + j_J % BLOCK_N, N - 1)
    m_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_block = tl.program_id(1) * span
    last_block = tl.minimum(first_block + span, tl.cdiv(K, 128))
    pdl.wait(PDL)
    pdl.release(PDL)
    out_JM = tiles.rows_product(
        tl.zeros((j_J.shape[0], BLOCK_M), tl.float32), x_ptr, m_M, m_M < M, x_stride, x_scales_ptr,
        x_scales_row_stride, x_scales_stride, w_ptr, row_J.to(tl.int64), w_stride, scales_ptr, (matrix_J + n) // 128,
        scales_stride, first_block, last_block, K, QUANTISED, EVEN_K, STAGES,
    )  # fmt: skip
    if GATED:
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(out_JM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        out_NM = tiles.silu_product(gate_NM, up_NM)
    else:
        out_NM = out_JM
    out_ptrs_NM = out_ptr + ((m_M.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * N)[None, :] + n_N[:, None]
    tl.store(out_ptrs_NM, out_NM, mask=(n_N < N)[:, None] & (m_M < M)[None, :])


class Config(NamedTuple):
    block_m: int  # 1: the vector kernel
    block_n: int
    warps: int
    stages: int = 1  # of the matrix kernel


def choose(rows: int, outputs: int, chip: Chip) -> Config:
    """The configuration for ``rows`` tokens."""
    if rows == 1:
        return Config(1, 8, 2)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    return Config(block_m, 64, 4, 6 if chip.shared_memory >= 160 << 10 else 2)


def splits_for(outputs: int, inputs: int, rows: int, chip: Chip) -> int:
    """How many parts of K fill the chip."""
    config = choose(rows, outputs, chip)
    programs = triton.cdiv(outputs, config.block_n)
    return max(1, min(2 * chip.processors // programs, triton.cdiv(inputs, GROUP * 8)))


def fp8_linear(
    x: Codes | torch.Tensor,
    weight_NK: torch.Tensor,
    scales_RC: torch.Tensor,
    gated: bool = False,
    splits: int | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x W^T as BF16 [M, N]; with ``splits``, FP32 partial results [M, S, N] to be added.

    ``x``: codes, or BF16 [M, K] (always so on a chip without FP8 units). ``gated``: ``weight_NK`` is [gate; up] and the
    result, half as wide, is silu(gate) * up.
    """
    name = "fp8_linear"
    values_MK = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values_MK.device)
    rows, inputs = values_MK.shape
    outputs = weight_NK.shape[0] // 2 if gated else weight_NK.shape[0]
    _check(name, values_MK, weight_NK, scales_RC, gated, chip)
    check(not (gated and splits), "a gated product cannot be split", name)
    config = config or choose(rows, outputs, chip)
    parts = splits or 1
    span = triton.cdiv(triton.cdiv(inputs, GROUP), parts)
    shape, dtype = ((rows, parts, outputs), torch.float32) if splits else ((rows, outputs), torch.bfloat16)
    out = torch.empty(shape, dtype=dtype, device=values_MK.device)
    w = weight_NK if chip.fp8_units else weight_NK.view(torch.uint8)
    x_scales = x.scales if isinstance(x, Codes) else None
    x_scales_strides = x.scales.stride() if isinstance(x, Codes) else (0, 0)
    grid_N = triton.cdiv(outputs, config.block_n)
    common = {
        "GATED": gated, "QUANTISED": isinstance(x, Codes), "EVEN_K": inputs % GROUP == 0, "PDL": chip.dependent_launch,
        "BLOCK_N": config.block_n, **options(chip, config.warps),
    }  # fmt: skip
    if config.block_m == 1:
        _one_row[(grid_N, parts)](
            values_MK, x_scales, x_scales_strides[1], w, w.stride(0), scales_RC,
            scales_RC.stride(0), out, outputs, inputs, span, **row_tile(values_MK, config.warps, chip), **common,
        )  # fmt: skip
    else:
        _rows[(grid_N, parts, triton.cdiv(rows, config.block_m))](
            values_MK, values_MK.stride(0), x_scales, *x_scales_strides, w, w.stride(0), scales_RC,
            scales_RC.stride(0), out, rows, outputs, inputs, span, BLOCK_M=config.block_m, STAGES=config.stages,
            **common,
        )  # fmt: skip
    return out


def row_tile(x_MK: torch.Tensor, warps: int, chip: Chip) -> dict[str, int]:
    """BLOCKS and VECTOR of the one-row product: 16 bytes of the row for each thread."""
    vector = 16 // x_MK.element_size()
    return {"BLOCKS": warps * chip.warp * vector // GROUP, "VECTOR": vector}


def _check(name: str, x_MK: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, gated: bool, chip: Chip) -> None:
    blocks = tuple(triton.cdiv(size, GROUP) for size in w.shape)
    check(x_MK.shape[1] == w.shape[1], f"activations {tuple(x_MK.shape)} for weights {tuple(w.shape)}", name)
    check(x_MK.stride(1) == 1 and w.stride(1) == 1, "channels must be contiguous", name)
    check(x_MK.dtype in (chip.fp8, torch.bfloat16), f"activations in {x_MK.dtype}", name)
    check(chip.fp8_units or x_MK.dtype == torch.bfloat16, f"{chip.name} takes BF16 activations", name)
    check(w.dtype == chip.fp8, f"weights in {w.dtype}", name)
    fits = tuple(scales.shape) == blocks and scales.stride(1) == 1 and scales.dtype == torch.float32
    check(fits, f"scales {tuple(scales.shape)} for blocks {blocks}", name)
    check(not gated or w.shape[0] % (2 * GROUP) == 0, "gate and up rows must be whole blocks", name)


def dequantise_weight(weight_NK: torch.Tensor, scales_RC: torch.Tensor) -> torch.Tensor:
    """float32 weights [N, K]."""
    rows, columns = weight_NK.shape
    spread = scales_RC.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]
    return weight_NK.float() * spread


def fp8_linear_eager(
    x: Codes | torch.Tensor, weight_NK: torch.Tensor, scales_RC: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """The twin of `fp8_linear`, FP32 [M, N]."""
    x_MK = dequantise(x) if isinstance(x, Codes) else x.float()
    out_MN = x_MK @ dequantise_weight(weight_NK, scales_RC).t()
    if not gated:
        return out_MN
    gate_MN, up_MN = out_MN.chunk(2, dim=1)
    return torch.nn.functional.silu(gate_MN) * up_MN
