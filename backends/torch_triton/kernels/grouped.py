"""Many tokens times the experts they chose: prompts, where the matrix units are the limit and not the memory.

Tokens are the tall side of a tile, unlike in `experts`, whose tiles are for the few pairs of decoding. Pairs of a token
and its choice lie in memory sorted by expert: gathering rows inside the products costs more than copying them first.
Gate and up are one product here; `quant.quantise` joins their halves.

Shape letters: T tokens, P choices of a token, R = T P pairs, E experts, N outputs, K inputs, U tiles of pairs of one
expert, M pairs of a tile, J weight rows of a tile, X 128 channels. Every sum has a fixed order.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16, and section 3.3 for the promotion every 128 of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import e4m3, pdl
from .chips import Chip, check, chip_of, options
from .fp8_linear import dequantise_weight
from .quant import GROUP, Codes, dequantise


class Sorted(NamedTuple):
    """Pairs sorted by expert, and tiles of them."""

    pair_R: torch.Tensor  # int32: t P + p
    expert_U: torch.Tensor  # int32; a tile whose expert is not in the stack is not run
    start_U: torch.Tensor  # int32, the tile's first place among the sorted pairs
    rows_U: torch.Tensor  # int32


def sort_pairs(ids_TP: torch.Tensor, experts: int, block_m: int) -> Sorted:
    """Tiles of up to ``block_m`` pairs with the same expert. Nothing is asked of the device."""
    pairs, device = ids_TP.numel(), ids_TP.device
    sorted_R, pair_R = ids_TP.flatten().sort(stable=True)
    edges = torch.searchsorted(sorted_R, torch.arange(experts + 1, dtype=torch.int32, device=device))
    tiles_E = (edges.diff() + block_m - 1) // block_m
    end_E = tiles_E.cumsum(0)
    tile_U = torch.arange(min(pairs, min(experts, pairs) + pairs // block_m), device=device)
    expert_U = torch.searchsorted(end_E, tile_U, right=True)
    here_U = expert_U.clamp(max=experts - 1)
    start_U = edges[here_U] + (tile_U - (end_E - tiles_E)[here_U]) * block_m
    rows_U = (edges[here_U + 1] - start_U).clamp(max=block_m)
    return Sorted(pair_R.int(), expert_U.int(), start_U.int(), rows_U.int())


def gather(x: Codes | torch.Tensor, pairs: Sorted, choices: int) -> Codes | torch.Tensor:
    """The tokens' activations, a row for each sorted pair."""
    token_R = pairs.pair_R // choices
    if isinstance(x, torch.Tensor):
        return x.index_select(0, token_R)
    words = x.codes.view(torch.int64).index_select(0, token_R)
    return Codes(words.view(x.codes.dtype), x.scales.t().index_select(1, token_R).t())


@triton.jit(do_not_specialize=["x_scales_stride", "R"])
def _grouped(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, factors_ptr, pair_ptr, expert_ptr, start_ptr,
    rows_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e, scales_stride, out_ptr, R, E, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SCATTER: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, tiles of pairs. SCATTER: results are multiplied by factors and stored where pairs were."""
    pdl.wait(PDL)
    pdl.release(PDL)
    tile = tl.program_id(1)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    n = tl.program_id(0) * BLOCK_N
    n_J = n + tl.arange(0, BLOCK_N)
    start = tl.load(start_ptr + tile)
    end = start + tl.load(rows_ptr + tile)
    # Consecutive rows, also past the tile's own: a third faster than loads with a mask or a limit for each row.
    row_M = tl.minimum(start, R - BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    x_X = tl.arange(0, 128)
    x_ptrs_MX = x_ptr + (row_M * x_stride)[:, None] + x_X[None, :]
    w_row_J = tl.minimum(n_J, N - 1).to(tl.int64)
    w_ptrs_JX = w_ptr + expert * w_stride_e + (w_row_J * w_stride)[:, None] + x_X[None, :]
    x_scale_ptrs_M = x_scales_ptr + row_M * x_scales_row_stride if QUANTISED else x_scales_ptr
    scale_ptr = scales_ptr + expert * scales_stride_e + n // 128 * scales_stride
    acc_MJ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        if EVEN_K:
            x_MX = tl.load(x_ptrs_MX + block * 128)
            w_JX = tl.load(w_ptrs_JX + block * 128)
        else:
            inside_X = block * 128 + x_X < K
            x_MX = tl.load(x_ptrs_MX + block * 128, mask=tl.broadcast_to(inside_X[None, :], x_ptrs_MX.shape), other=0.0)
            w_JX = tl.load(w_ptrs_JX + block * 128, mask=tl.broadcast_to(inside_X[None, :], w_ptrs_JX.shape), other=0.0)
        scale = tl.load(scale_ptr + block)
        if QUANTISED:
            x_scale_M = tl.load(x_scale_ptrs_M + block * x_scales_stride)
            acc_MJ += tl.dot(x_MX, tl.trans(w_JX)) * (x_scale_M * scale)[:, None]
        else:
            acc_MJ += tl.dot(x_MX, tl.trans(e4m3.decode(w_JX).to(tl.bfloat16))) * scale
    own_M = (row_M >= start) & (row_M < end)
    if SCATTER:
        row_M = tl.load(pair_ptr + row_M).to(tl.int64)
        acc_MJ *= tl.load(factors_ptr + row_M)[:, None]
    tl.store(out_ptr + (row_M * N)[:, None] + n_J[None, :], acc_MJ, mask=own_M[:, None] & (n_J < N)[None, :])


class Config(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int


def choose(chip: Chip) -> Config:
    """Tiles small enough that three programs share a processor: one multiplies while others add up or wait."""
    if chip.shared_memory < 160 << 10:
        return Config(64, 64, 4, 2)
    return Config(64, 128, 4, 3)


def grouped(
    x: Codes | torch.Tensor,
    weights_ENK: torch.Tensor,
    scales_ERC: torch.Tensor,
    pairs: Sorted,
    factors_TP: torch.Tensor | None = None,
    foreign: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """Each row of x [R, K], of sorted pairs, times its expert's matrix: BF16 [R, N].

    ``x``: codes, or BF16 (always so on a chip without FP8 units). With ``factors_TP`` each result is multiplied by its
    pair's factor and lies where the pair was before sorting. Rows of pairs in no tile are zero if ``foreign``
    says that there may be some, and undefined otherwise.
    """
    name = "grouped"
    values = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values.device)
    experts, outputs, inputs = weights_ENK.shape
    config = config or choose(chip)
    blocks = (experts, triton.cdiv(outputs, GROUP), triton.cdiv(inputs, GROUP))
    check(values.shape == (len(pairs.pair_R), inputs), f"x {tuple(values.shape)} for {tuple(weights_ENK.shape)}", name)
    check(len(values) >= config.block_m, f"{len(values)} pairs are less than a tile", name)
    check(values.stride(1) == 1 and weights_ENK.stride(2) == 1, "channels must be contiguous", name)
    check(weights_ENK.dtype == chip.fp8, f"experts in {weights_ENK.dtype}", name)
    check(values.dtype == (chip.fp8 if isinstance(x, Codes) else torch.bfloat16), f"x in {values.dtype}", name)
    check(chip.fp8_units or not isinstance(x, Codes), f"{chip.name} takes BF16 activations", name)
    fits = tuple(scales_ERC.shape) == blocks and scales_ERC.stride(2) == 1 and scales_ERC.dtype == torch.float32
    check(fits, f"scales {tuple(scales_ERC.shape)} for blocks {blocks}", name)
    if factors_TP is not None:
        fits = factors_TP.is_contiguous() and factors_TP.numel() == len(values) and factors_TP.dtype == torch.float32
        check(fits, f"factors {tuple(factors_TP.shape)}", name)
    room = torch.zeros if foreign else torch.empty
    out = room(len(values), outputs, dtype=torch.bfloat16, device=values.device)
    x_scales, x_scales_strides = (x.scales, x.scales.stride()) if isinstance(x, Codes) else (None, (0, 0))
    codes = weights_ENK if chip.fp8_units else weights_ENK.view(torch.uint8)
    _grouped[(triton.cdiv(outputs, config.block_n), len(pairs.expert_U))](
        values, values.stride(0), x_scales, *x_scales_strides, factors_TP, *pairs, codes, *codes.stride()[:2],
        scales_ERC, *scales_ERC.stride()[:2], out, len(values), experts, outputs, inputs, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.stages, SCATTER=factors_TP is not None,
        QUANTISED=isinstance(x, Codes), EVEN_K=inputs % GROUP == 0, PDL=chip.dependent_launch,
        **options(chip, config.warps),
    )  # fmt: skip
    return out


def grouped_eager(
    x: Codes | torch.Tensor,
    weights_ENK: torch.Tensor,
    scales_ERC: torch.Tensor,
    pairs: Sorted,
    ids_TP: torch.Tensor,
    factors_TP: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `grouped`, FP32, by the choices instead of tiles; zero for pairs whose expert is not there."""
    values_RK = dequantise(x) if isinstance(x, Codes) else x.float()
    out_RN = values_RK.new_zeros(len(values_RK), weights_ENK.shape[1])
    expert_R = ids_TP.flatten()[pairs.pair_R.long()]
    for expert in expert_R.unique().tolist():
        if 0 <= expert < len(weights_ENK):
            weight_NK = dequantise_weight(weights_ENK[expert], scales_ERC[expert])
            out_RN[expert_R == expert] = values_RK[expert_R == expert] @ weight_NK.t()
    if factors_TP is None:
        return out_RN
    scattered_RN = torch.empty_like(out_RN)
    scattered_RN[pairs.pair_R.long()] = out_RN
    return scattered_RN * factors_TP.reshape(-1, 1)
