"""Many tokens times the experts they chose: prompts, where the matrix units are the limit and not the memory.

Tokens are the tall side of a tile, unlike in `experts`, whose tiles are for the few pairs of decoding. Pairs of a token
and its choice lie in memory sorted by expert: gathering rows inside the products costs more than copying them first.
Gate and up are one product here; `grouped_hopper` joins the halves, elsewhere what quantises them does. A dense layer
is a group of its own.

Shape letters: T tokens, P choices of a token, R = T P pairs, E experts, N outputs, K inputs, U tiles of pairs of one
expert, M pairs of a tile, J weight rows of a tile, X 128 channels. Every sum has a fixed order.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16, and section 3.3 for the promotion every 128 of K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import e4m3, grouped_hopper, int4, pdl
from .chips import Chip, check, chip_of, options
from .pairs import Sorted
from .quant import Codes, dequantise
from .sizes import cdiv
from .weights import Fp8Weight, Weight, arguments, check_weight, dequantise_weight, matrix_of


@triton.jit(do_not_specialize=["x_scales_stride", "R"])
def _grouped(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr,
    rows_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e, scales_stride, order_ptr, out_ptr, R, E,
    N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SCATTER: tl.constexpr,
    KIND: tl.constexpr, GROUPS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
    INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, tiles of pairs. SCATTER: results are multiplied by factors and stored where pairs were.

    Without a tensor of experts all rows are one matrix's.
    """
    pdl.wait(PDL)
    pdl.release(PDL)
    tile = tl.program_id(1)
    if expert_ptr is None:
        expert = tl.full((), 0, tl.int64)
        start = tile * BLOCK_M
        end = tl.minimum(start + BLOCK_M, R)
    else:
        expert = tl.load(expert_ptr + tile).to(tl.int64)
        if (expert < 0) | (expert >= E):
            return
        start = tl.load(start_ptr + tile)
        end = start + tl.load(rows_ptr + tile)
    n = tl.program_id(0) * BLOCK_N
    n_J = n + tl.arange(0, BLOCK_N)
    # Consecutive rows, also past the tile's own: a third faster than loads with a mask or a limit for each row.
    row_M = tl.minimum(start, R - BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    x_ptr_M = x_ptr + row_M * x_stride
    w_row_J = tl.minimum(n_J, N - 1).to(tl.int64)
    w_ptr += expert * w_stride_e
    w_ptr_J = w_ptr + w_row_J * w_stride
    scales_ptr += expert * scales_stride_e
    if KIND == "int4":
        if order_ptr is not None:
            order_ptr += expert * (tl.cdiv(K, 128) * 128)
        acc_MJ = _int4_product(
            x_ptr_M, w_ptr, w_row_J, w_stride, scales_ptr, scales_stride, order_ptr, K, GROUPS, EVEN_K, INSTRUCTION,
            STAGES,
        )  # fmt: skip
    elif KIND == "int8":
        sum_MJ = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
            x_MX, w_JX = _block(x_ptr_M, w_ptr_J, block, K, EVEN_K)
            sum_MJ = tl.dot(x_MX, tl.trans(w_JX), sum_MJ, out_dtype=tl.int32)
        acc_MJ = sum_MJ.to(tl.float32) * tl.load(scales_ptr + w_row_J)[None, :]
    else:
        scales_ptr += n // 128 * scales_stride
        x_scale_ptrs_M = x_scales_ptr + row_M * x_scales_row_stride if QUANTISED else x_scales_ptr
        acc_MJ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
            x_MX, w_JX = _block(x_ptr_M, w_ptr_J, block, K, EVEN_K)
            scale = tl.load(scales_ptr + block)
            if KIND == "int8 blocks":
                acc_MJ += tl.dot(x_MX, tl.trans(w_JX), out_dtype=tl.int32).to(tl.float32) * scale
            elif QUANTISED:
                x_scale_M = tl.load(x_scale_ptrs_M + block * x_scales_stride)
                acc_MJ += tl.dot(x_MX, tl.trans(w_JX)) * (x_scale_M * scale)[:, None]
            else:
                acc_MJ += tl.dot(x_MX, tl.trans(e4m3.decode(w_JX).to(tl.bfloat16))) * scale
    if KIND == "int8" or KIND == "int8 blocks":
        acc_MJ *= tl.load(x_scales_ptr + row_M * x_scales_row_stride)[:, None]
    own_M = (row_M >= start) & (row_M < end)
    if SCATTER:
        row_M = tl.load(pair_ptr + row_M).to(tl.int64)
        acc_MJ *= tl.load(factors_ptr + row_M)[:, None]
    tl.store(out_ptr + (row_M * N)[:, None] + n_J[None, :], acc_MJ, mask=own_M[:, None] & (n_J < N)[None, :])


@triton.jit
def _block(x_ptr_M, w_ptr_J, block, K, EVEN_K: tl.constexpr):
    """Tiles of activations and weights of 128 channels."""
    k_X = block * 128 + tl.arange(0, 128)
    x_ptrs_MX = x_ptr_M[:, None] + k_X[None, :]
    w_ptrs_JX = w_ptr_J[:, None] + k_X[None, :]
    if EVEN_K:
        x_MX = tl.load(x_ptrs_MX)
        w_JX = tl.load(w_ptrs_JX)
    else:
        x_MX = tl.load(x_ptrs_MX, mask=tl.broadcast_to((k_X < K)[None, :], x_ptrs_MX.shape), other=0.0)
        w_JX = tl.load(w_ptrs_JX, mask=tl.broadcast_to((k_X < K)[None, :], w_ptrs_JX.shape), other=0.0)
    return x_MX, w_JX


@triton.jit
def _int4_product(
    x_ptr_M, w_ptr, w_row_J, block_stride, scales_ptr, scales_stride, order_ptr, K, GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr, INSTRUCTION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[M, J]. Weights are the left operand: what is computed in registers goes from there to Hopper's matrix units."""
    w_ptrs_JX = w_ptr + (w_row_J * 32)[:, None] + tl.arange(0, 32)[None, :]
    acc_JM = tl.zeros((w_row_J.shape[0], x_ptr_M.shape[0]), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        words_JX = tl.load(w_ptrs_JX + block * block_stride)
        groups = int4.load_groups(scales_ptr + block * GROUPS * scales_stride + w_row_J, scales_stride, GROUPS)
        fields = int4.decode(words_JX, groups, INSTRUCTION)
        for group in tl.static_range(GROUPS):
            k_X = block * 128 + group * (128 // GROUPS) + tl.arange(0, 128 // GROUPS)
            from_X = k_X if order_ptr is None else tl.load(order_ptr + k_X)
            x_ptrs_MX = x_ptr_M[:, None] + from_X[None, :]
            if EVEN_K:
                x_MX = tl.load(x_ptrs_MX)
            else:
                x_MX = tl.load(x_ptrs_MX, mask=tl.broadcast_to((k_X < K)[None, :], x_ptrs_MX.shape), other=0.0)
            product_JM = tl.dot(int4.channels(fields, group, GROUPS), tl.trans(x_MX))
            acc_JM += product_JM * int4.scale(groups, group, GROUPS)[:, None]
    return tl.trans(acc_JM)


class Config(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int
    has_tasks: bool = False  # the kernel of `grouped_hopper`, which alone takes gated products


HOPPER = Config(grouped_hopper.ROWS, grouped_hopper.TILE, 4, grouped_hopper.STAGES, has_tasks=True)
HOPPER_PAIRS = 72  # an expert: 2 % faster at so many of DeepSeek-V3's, slower at 36


def choose_for_experts(pairs: int, stack: Sequence[Weight], chip: Chip) -> Config:
    """Of both products of a stack [gate and up, down], for ``pairs`` of its own."""
    if pairs >= HOPPER_PAIRS * len(stack[0].codes) and all(grouped_hopper.takes(weight, chip) for weight in stack):
        return HOPPER
    return choose(chip)


def choose(chip: Chip) -> Config:
    """Tiles small enough that three programs share a processor: one multiplies while others add up or wait."""
    return Config(64, 64, 4, 2) if chip.shared_memory < 160 << 10 else Config(64, 128, 4, 3)


def grouped(
    x: Codes | torch.Tensor,
    weight: Weight,
    pairs: Sorted,
    factors_TP: torch.Tensor | None = None,
    config: Config | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Each row of x [R, K], of sorted pairs, times its expert's matrix: BF16 [R, N].

    ``x``: codes or BF16, as `few_rows` takes them. With ``factors_TP`` each result is multiplied by its
    pair's factor and lies where the pair was before sorting. Rows of pairs in no tile are undefined. ``gated``:
    silu(gate) * up for matrices [gate; up], [R, N / 2]; where ``config`` takes it.
    """
    name, rows = "grouped", _rows(x)
    check(rows == len(pairs.pair_R), f"{rows} rows for {len(pairs.pair_R)} pairs", name)
    if factors_TP is not None:
        fits = factors_TP.is_contiguous() and factors_TP.numel() == rows and factors_TP.dtype == torch.float32
        check(fits, f"factors {tuple(factors_TP.shape)}", name)
    return _launch(name, x, weight, pairs, factors_TP, config, gated)


def one_matrix(x: Codes | torch.Tensor, weight: Weight, config: Config | None = None) -> torch.Tensor:
    """Many rows x [R, K] times one matrix: BF16 [R, N]."""
    return _launch("one_matrix", x, weight, None, None, config)


def _rows(x: Codes | torch.Tensor) -> int:
    return len(x.codes if isinstance(x, Codes) else x)


def _launch(
    name: str, x: Codes | torch.Tensor, weight: Weight, pairs: Sorted | None, factors_TP: torch.Tensor | None,
    config: Config | None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    values = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values.device)
    outputs = weight.codes.shape[-2]
    config = config or choose(chip)
    check_weight(weight, values, chip, name)
    check(len(values) >= config.block_m, f"{len(values)} rows are less than a tile", name)
    check(not gated or (config.has_tasks and factors_TP is None), f"gated products by {config}", name)
    columns = outputs // 2 if gated else outputs
    out = torch.empty(len(values), columns, dtype=torch.bfloat16, device=values.device)
    x_scales, x_scales_strides = (x.scales, x.scales.stride()) if isinstance(x, Codes) else (None, (0, 0))
    if config.has_tasks:
        assert isinstance(x, Codes) and isinstance(weight, Fp8Weight) and pairs is not None, "what HOPPER is chosen for"
        grouped_hopper.launch(x, weight, pairs.tiles, factors_TP, out, gated, chip.processors)
        return out
    tables = (None,) * 4 if pairs is None else pairs.tiles
    tiles = cdiv(len(values), config.block_m) if pairs is None else len(pairs.expert_U)
    pointers, constants = arguments(weight, chip)
    _grouped[(cdiv(outputs, config.block_n), tiles)](
        values, values.stride(0), x_scales, *x_scales_strides, factors_TP, *tables, *pointers, out,
        len(values), len(weight.codes), outputs, values.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STAGES=config.stages, SCATTER=factors_TP is not None, QUANTISED=isinstance(x, Codes),
        PDL=chip.dependent_launch, **constants, **options(chip, config.warps),
    )  # fmt: skip
    return out


def grouped_eager(
    x: Codes | torch.Tensor,
    weight: Weight,
    pairs: Sorted,
    ids_TP: torch.Tensor,
    factors_TP: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The twin of `grouped`, FP32, by the choices instead of tiles; zero for pairs whose expert is not there."""
    values_RK = dequantise(x) if isinstance(x, Codes) else x.float()
    out_RN = values_RK.new_zeros(len(values_RK), weight.codes.shape[-2])
    expert_R = ids_TP.flatten()[pairs.pair_R.long()]
    for expert in expert_R.unique().tolist():
        if 0 <= expert < len(weight.codes):
            weight_NK = dequantise_weight(matrix_of(weight, expert))
            out_RN[expert_R == expert] = values_RK[expert_R == expert] @ weight_NK.t()
    if gated:
        gate_RN, up_RN = out_RN.chunk(2, dim=1)
        out_RN = torch.nn.functional.silu(gate_RN) * up_RN
    if factors_TP is None:
        return out_RN
    scattered_RN = torch.empty_like(out_RN)
    scattered_RN[pairs.pair_R.long()] = out_RN
    return scattered_RN * factors_TP.reshape(-1, 1)
