"""The experts that a step's tokens chose, and only those, without asking the host which they are.

All experts of a layer are one stack with the shared expert at its end (two of the routed width are two experts); the
router lists it among each token's choices with weight 1, so nothing here knows of it. A "pair" is one token and one of
its choices. Pairs of the same expert form tiles, so that an expert's weights are read once.

Shape letters: T tokens, P choices per token (the shared expert included), E experts in the stack, D hidden, I expert
width, U tiles of pairs of one expert, M pairs of a tile, J weight rows of a tile. Every sum has a fixed order.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import Chip, check, chip_of, counters, options
from .quant import GROUP, Codes, dequantise
from .shares import even_share, gated_share
from .sizes import cdiv, power_of_2
from .weights import Int4Weight, Weight, arguments, check_weight, dequantise_weight, matrix_of


class Stack(NamedTuple):
    """Weights of all experts. Rows of ``gate_up`` are gate's, then up's."""

    gate_up: Weight  # [E, 2 I, D]
    down: Weight  # [E, D, I]


class Tiles(NamedTuple):
    """Which pairs run together: from `group`, or each by itself, which is right for one token: choices are distinct."""

    expert_U: torch.Tensor  # int32; a tile whose expert is not in the stack is not run
    rows_U: torch.Tensor | None = None  # int32, pairs in the tile
    pair_UM: torch.Tensor | None = None  # int32, undefined past the tile's rows


@triton.jit(do_not_specialize=["pairs", "tiles_limit", "most"])
def _group(
    ids_ptr, count_ptr, start_ptr, expert_ptr, rows_ptr, pair_ptr, E, pairs, tiles_limit, most,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles of up to BLOCK_M pairs with the same expert, experts ascending.

    Which slot of a tile a pair gets is left to the order of atomic additions: no result depends on it.
    """
    expert_E = tl.arange(0, EXPERTS)
    pair_P = tl.arange(0, PAIRS)
    pdl.wait(PDL)
    pdl.release(PDL)
    tl.store(count_ptr + expert_E, tl.zeros((EXPERTS,), tl.int32))
    id_P = tl.load(ids_ptr + pair_P, mask=pair_P < pairs, other=-1)
    here_P = tiles.is_own(id_P, E)
    tl.debug_barrier()
    rank_P = tl.atomic_add(count_ptr + id_P, 1, mask=here_P)
    tl.debug_barrier()
    count_E = tl.load(count_ptr + expert_E, cache_modifier=".cg")
    tiles_E = (count_E + BLOCK_M - 1) // BLOCK_M
    end_E = tl.cumsum(tiles_E, 0)
    start_E = end_E - tiles_E
    tl.store(start_ptr + expert_E, start_E)
    for j in range(most):
        tl.store(expert_ptr + start_E + j, expert_E, mask=j < tiles_E)
        tl.store(rows_ptr + start_E + j, tl.minimum(count_E - j * BLOCK_M, BLOCK_M), mask=j < tiles_E)
    tile_U = tl.arange(0, LIMIT)
    unused_U = (tile_U >= tl.sum(tiles_E, 0)) & (tile_U < tiles_limit)
    tl.store(expert_ptr + tile_U, tl.full((LIMIT,), -1, tl.int32), mask=unused_U)
    tl.debug_barrier()
    tile_P = tl.load(start_ptr + id_P, mask=here_P, other=0, cache_modifier=".cg") + rank_P // BLOCK_M
    tl.store(pair_ptr + tile_P * BLOCK_M + rank_P % BLOCK_M, pair_P, mask=here_P)


@triton.jit(do_not_specialize=["x_scales_stride"])
def _rows(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, weights_ptr,
    expert_ptr, rows_ptr, pair_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e, scales_stride,
    order_ptr, out_ptr, sum_ptr, counter_ptr, beside_ptr, E, N, K, P: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, FOREIGN: tl.constexpr,
    KIND: tl.constexpr, GROUPS: tl.constexpr, QUANTISED: tl.constexpr, EVEN_K: tl.constexpr,
    INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, tiles of pairs. Rows of x are tokens if gated; otherwise pairs, weighted by the router, and of
    one token, whose tiles are its choices, added.

    FOREIGN: of these some may be outside the stack, all of them too.
    """
    pdl.wait(PDL)
    pdl.release(PDL)
    tile = tl.program_id(1)
    n = tl.program_id(0) * ROWS
    n_N = n + tl.arange(0, BLOCK_N)
    valid_N = n_N < tl.minimum(N, n + ROWS)
    own = _count_own(expert_ptr, E, P) if FOREIGN else P
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if not tiles.is_own(expert, E):
        if FOREIGN:
            _sum_of_none(own, tile, out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P)
        return
    row_J, scale_row_J = tiles.rows_of_tile(n, N, ROWS, BLOCK_N, GATED)
    valid_J = None if ROWS == BLOCK_N else tiles.used_places(ROWS, BLOCK_N, GATED)
    slot_M = tl.arange(0, BLOCK_M)
    if pair_ptr is None:
        valid_M = slot_M < 1
        pair_M = tile + tl.zeros((BLOCK_M,), tl.int32)
    else:
        valid_M = slot_M < tl.load(rows_ptr + tile)
        pair_M = tl.load(pair_ptr + tile * BLOCK_M + slot_M, mask=valid_M, other=0)
    x_row_M = pair_M // P if GATED else pair_M
    if order_ptr is not None:
        order_ptr += expert * (tl.cdiv(K, 128) * 128)
    out_JM = tiles.rows_product(
        x_ptr, x_row_M, valid_M, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride,
        w_ptr + expert * w_stride_e, row_J, valid_J, w_stride, scales_ptr + expert * scales_stride_e,
        scale_row_J, scales_stride, order_ptr, 0, tl.cdiv(K, 128), K, KIND, GROUPS, QUANTISED, EVEN_K, INSTRUCTION,
        STAGES,
    )  # fmt: skip
    if GATED:
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(out_JM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        out_NM = tiles.silu_product(gate_NM, up_NM)
    else:
        out_NM = out_JM * tl.load(weights_ptr + pair_M, mask=valid_M, other=0.0)[None, :]
    out_ptrs_NM = out_ptr + (pair_M.to(tl.int64) * N)[None, :] + n_N[:, None]
    tl.store(out_ptrs_NM, out_NM, mask=valid_N[:, None] & valid_M[None, :])
    if sum_ptr is not None:
        _add_up(
            own, counter_ptr + tl.program_id(0), out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P,
            FOREIGN,
        )  # fmt: skip


@triton.jit
def _add_up(
    own, counter_ptr, out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P: tl.constexpr,
    FOREIGN: tl.constexpr,
):  # fmt: skip
    """By the last program of a tile of N to finish."""
    if tiles.is_last(counter_ptr, own):
        _store_sum(out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P, FOREIGN)


@triton.jit
def _sum_of_none(own, tile, out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P: tl.constexpr):
    """By the first program of a tile of N, if no choice is here."""
    if (own == 0) & (tile == 0):
        _store_sum(out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P, True)


@triton.jit
def _count_own(expert_ptr, E, P: tl.constexpr):
    """Of one token's choices."""
    own = tiles.is_own(tl.load(expert_ptr), E).to(tl.int32)
    for p in tl.static_range(1, P):
        own += tiles.is_own(tl.load(expert_ptr + p), E).to(tl.int32)
    return own


@triton.jit
def _store_sum(
    out_ptr, sum_ptr, beside_ptr, expert_ptr, n_N, valid_N, N, E, P: tl.constexpr, FOREIGN: tl.constexpr
):  # fmt: skip
    """All pairs of one token in their order, and what is beside them."""
    sum_N = tl.zeros(n_N.shape, tl.float32)
    for p in tl.static_range(P):
        mask_N = valid_N
        if FOREIGN:
            mask_N &= tiles.is_own(tl.load(expert_ptr + p), E)
        sum_N += tl.load(out_ptr + p * N + n_N, mask=mask_N, other=0.0, cache_modifier=".cg")
    if beside_ptr is not None:
        sum_N += tl.load(beside_ptr + n_N, mask=valid_N, other=0.0).to(tl.float32)
    tl.store(sum_ptr + n_N, sum_N, mask=valid_N)


class Config(NamedTuple):
    """Rows: outputs of a tile; the tile is as large as the next power of two."""

    block_m: int
    gate_up_rows: int
    gate_up_stages: int
    down_rows: int
    down_stages: int
    warps: int = 4


def choose(ids_TP: torch.Tensor, stack: Stack, chip: Chip, part: float = 1.0) -> Config:
    """One token: tiles that all run at once, as many on each processor. More: deep pipelines count instead.

    INT4 has more programs on a processor, as in `few_rows`. ``part`` of all experts are in the stack: the rank that the
    others wait for may have twice its share of the choices.
    """
    tokens, choices = ids_TP.shape
    choices = min(choices, ceil(2 * part * choices))
    width, hidden = stack.gate_up.codes.shape[-2] // 2, stack.down.codes.shape[-2]
    if chip.shared_memory < 160 << 10:
        return Config(16 if tokens <= 128 else 32, 32, 2, 64, 2)
    if isinstance(stack.gate_up, Int4Weight):
        if tokens == 1:
            return Config(8, even_share(width, 10 * chip.processors // choices, 16) or 16, 6, 32, 4, 1)
        return Config(8, 32, 4, 64, 4, 2) if tokens <= 8 else Config(16 if tokens <= 128 else 32, 64, 4, 128, 6)
    if tokens == 1 and chip.shared_memory < 200 << 10:
        return Config(16, 32, 4, 64, 4)
    if tokens == 1:
        up = gated_share(width, choices, 16, chip) or (32, 4)
        even_down = even_share(hidden, 4 * chip.processors // choices, 128)
        return Config(16, *up, even_down or 64, 3 if even_down else 4)
    block_m, up_stages, down_stages = (16, 7, 5) if tokens <= 128 else (32, 5, 4)
    if width < 1024:  # a pipeline of few steps is not worth the room of another program
        down_stages = 2 if tokens <= 32 else 3
    return Config(block_m, 64, up_stages, 128, down_stages)


class Sum(NamedTuple):
    """Of one token's parts: where it goes, what else is added, and whether some parts may be outside the stack."""

    total: torch.Tensor | None = None  # [1, 1, D] float32
    beside: torch.Tensor | None = None  # [1, D]
    foreign: bool = False


def gate_up(
    x: Codes | torch.Tensor, ids_TP: torch.Tensor, stack: Stack, pairs: Tiles, config: Config | None = None
) -> torch.Tensor:
    """silu(gate x) * (up x) of every pair, BF16 [T P, I]; rows of pairs whose expert is not in the stack are undefined.

    ``x``: codes, or BF16 [T, D], as `few_rows` takes them.
    """
    values_TD = x.codes if isinstance(x, Codes) else x
    tokens = len(values_TD)
    check(ids_TP.shape[0] == tokens, f"choices {tuple(ids_TP.shape)} of {tokens} tokens", "gate_up")
    check(stack.gate_up.codes.shape[-2] % (2 * GROUP) == 0, "an expert's width must be whole blocks", "gate_up")
    config = config or choose(ids_TP, stack, chip_of(values_TD.device))
    width = stack.gate_up.codes.shape[-2] // 2
    out = torch.empty(ids_TP.numel(), width, dtype=torch.bfloat16, device=values_TD.device)
    rows, stages = config.gate_up_rows, config.gate_up_stages
    _launch("gate_up", x, None, pairs, stack.gate_up, out, ids_TP.shape[1], rows, stages, config, Sum())
    return out


def down(
    h: Codes | torch.Tensor,
    ids_TP: torch.Tensor,
    weights_TP: torch.Tensor,
    stack: Stack,
    pairs: Tiles,
    foreign: bool = False,
    config: Config | None = None,
    beside_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """The down projection times the router's weights: FP32 partial results [T, P, D] for the next norm to add; of one
    token their sum, [1, 1, D], with what ``beside_TD``, BF16, has of it.

    ``h``: from `gate_up`, quantised or BF16. ``foreign``: choices may be outside the stack. Those of several tokens are
    undefined; of one token they add nothing.
    """
    values = h.codes if isinstance(h, Codes) else h
    tokens, choices = ids_TP.shape
    check(len(values) == ids_TP.numel() and values.is_contiguous(), f"activations {tuple(values.shape)}", "down")
    fits = weights_TP.shape == ids_TP.shape and weights_TP.is_contiguous()
    check(fits and weights_TP.dtype == torch.float32, f"weights {tuple(weights_TP.shape)}", "down")
    config = config or choose(ids_TP, stack, chip_of(values.device))
    out = torch.empty(tokens, choices, stack.down.codes.shape[-2], dtype=torch.float32, device=values.device)
    rows, stages = config.down_rows, config.down_stages
    total = torch.empty_like(out[:, :1]) if tokens == 1 else None
    if beside_TD is not None:
        fits = total is not None and beside_TD.shape == total.shape[1:] and beside_TD.stride(1) == 1
        check(fits, f"{tuple(beside_TD.shape)} beside {tokens} tokens", "down")
    adds = Sum(total, beside_TD, foreign)
    _launch("down", h, weights_TP, pairs, stack.down, out, choices, rows, stages, config, adds)
    return out if total is None else total


def _launch(
    name: str, x: Codes | torch.Tensor, weights_TP: torch.Tensor | None, pairs: Tiles, weight: Weight,
    out: torch.Tensor, choices: int, rows: int, stages: int, config: Config, adds: Sum,
) -> None:  # fmt: skip
    values = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values.device)
    check_weight(weight, values, chip, name)
    if pairs.pair_UM is not None:
        check(pairs.pair_UM.shape[1] == config.block_m, f"tiles of {pairs.pair_UM.shape[1]} pairs", name)
    x_scales, x_scales_strides = (x.scales, x.scales.stride()) if isinstance(x, Codes) else (None, (0, 0))
    outputs = out.shape[-1]
    pointers, constants = arguments(weight, chip)
    _rows[(cdiv(outputs, rows), len(pairs.expert_U))](
        values, values.stride(0), x_scales, *x_scales_strides, weights_TP, *pairs, *pointers, out, adds.total,
        None if adds.total is None else counters(values.device), adds.beside, len(weight.codes), outputs,
        values.shape[1], P=choices, BLOCK_M=config.block_m, ROWS=rows, BLOCK_N=power_of_2(rows), STAGES=stages,
        GATED=weights_TP is None, FOREIGN=adds.foreign and adds.total is not None, QUANTISED=isinstance(x, Codes),
        PDL=chip.dependent_launch, **constants, **options(chip, config.warps),
    )  # fmt: skip


def group(ids_TP: torch.Tensor, experts: int, config: Config) -> Tiles:
    """Tiles of the pairs of each expert; of one token without a launch."""
    check(ids_TP.dtype == torch.int32 and ids_TP.is_contiguous(), f"choices in {ids_TP.dtype}", "group")
    if len(ids_TP) == 1:
        return Tiles(ids_TP.view(-1))
    chip = chip_of(ids_TP.device)
    pairs = ids_TP.numel()
    block_m = config.block_m
    check(pairs <= 1 << 14, f"{pairs} pairs in one program", "group")
    limit = min(pairs, min(experts, pairs) + pairs // block_m)
    padded = power_of_2(experts)

    def int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_TP.device)

    out = Tiles(int32(limit), int32(limit), int32(limit, block_m))
    _group[(1,)](
        ids_TP, int32(padded), int32(padded), *out, experts, pairs, limit, cdiv(len(ids_TP), block_m),
        PAIRS=power_of_2(pairs), EXPERTS=padded, LIMIT=power_of_2(limit), BLOCK_M=block_m,
        PDL=chip.dependent_launch, **options(chip, 8),
    )  # fmt: skip
    return out


def gate_up_eager(x: Codes | torch.Tensor, ids_TP: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The twin of `gate_up`, FP32; zero for pairs whose expert is not in the stack."""
    x_TD = dequantise(x) if isinstance(x, Codes) else x.float()
    out = x_TD.new_zeros(*ids_TP.shape, stack.gate_up.codes.shape[-2] // 2)
    for t, p in (ids_TP.ge(0) & ids_TP.lt(len(stack.gate_up.codes))).nonzero().tolist():
        gate, up = (dequantise_weight(matrix_of(stack.gate_up, int(ids_TP[t, p]))) @ x_TD[t]).chunk(2)
        out[t, p] = torch.nn.functional.silu(gate) * up
    return out.flatten(0, 1)


def down_eager(h: Codes | torch.Tensor, ids_TP: torch.Tensor, weights_TP: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The twin of `down`, FP32 [T, P, D]."""
    h_TPI = (dequantise(h) if isinstance(h, Codes) else h.float()).view(*ids_TP.shape, -1)
    out = h_TPI.new_zeros(*ids_TP.shape, stack.down.codes.shape[-2])
    for t, p in (ids_TP.ge(0) & ids_TP.lt(len(stack.down.codes))).nonzero().tolist():
        weight = dequantise_weight(matrix_of(stack.down, int(ids_TP[t, p])))
        out[t, p] = weights_TP[t, p] * (weight @ h_TPI[t, p])
    return out
