"""The experts that a step's tokens chose, and only those, without asking the host which they are.

All experts of a layer are one stack with the shared expert at its end (two of the routed width are two experts); the
router lists it among each token's choices with weight 1, so nothing here knows of it. A "pair" is one token and one of
its choices. One token: each pair is a matrix-vector product, and the down projection is one sum over all pairs. Several
tokens: pairs of the same expert form tiles, so that an expert's weights are read once.

Shape letters: T tokens, P choices per token (the shared expert included), E experts in the stack, D hidden, I expert
width, U tiles of pairs of one expert, M pairs of a tile. Every sum has a fixed order.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import Chip, check, chip_of, options
from .fp8_linear import dequantise_weight, row_tile
from .quant import GROUP, Codes, dequantise


class Stack(NamedTuple):
    """FP8 weights of all experts. Rows of ``gate_up`` are gate's, then up's."""

    gate_up: torch.Tensor  # [E, 2 I, D]
    gate_up_scales: torch.Tensor  # [E, 2 I / 128, D / 128] float32
    down: torch.Tensor  # [E, D, I]
    down_scales: torch.Tensor  # [E, D / 128, I / 128] float32


class Tiles(NamedTuple):
    """Pairs ordered by expert; see `_group`."""

    expert_U: torch.Tensor  # int32, -1 for a tile that is not used
    rows_U: torch.Tensor  # int32, pairs in the tile
    pair_UM: torch.Tensor  # int32, undefined past the tile's rows


# One token ------------------------------------------------------------------------------------------------------------


@triton.jit
def _gate_up_one(
    x_ptr, x_scales_ptr, x_scales_stride, ids_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e,
    scales_stride, out_ptr, E, N, K, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, choices."""
    pdl.wait(PDL)
    pdl.release(PDL)
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    n = tl.program_id(0) * BLOCK_N
    n_N = n + tl.arange(0, BLOCK_N)
    row_AN = (tl.arange(0, 2) * N)[:, None] + tl.minimum(n_N, N - 1)[None, :]
    out_AN = tiles.one_row_product(
        x_ptr, x_scales_ptr, x_scales_stride, w_ptr + expert * w_stride_e, row_AN.to(tl.int64), w_stride,
        scales_ptr + expert * scales_stride_e, n // 128, (N + n) // 128, scales_stride, 0, tl.cdiv(K, 128), K,
        BLOCKS, VECTOR, True, QUANTISED, EVEN_K, False,
    )  # fmt: skip
    gate_N, up_N = tl.split(tl.trans(out_AN))
    tl.store(out_ptr + pair * N + n_N, tiles.silu_product(gate_N, up_N), mask=n_N < N)


@triton.jit
def _pair_of(step, steps, ids_ptr, blocks, E, BLOCKS: tl.constexpr):
    """Step of a sum over all pairs: (pair, expert, first block, last block); none for an expert not in the stack."""
    pair = step // steps
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    present = (expert >= 0) & (expert < E)
    return pair, tl.where(present, expert, 0), (step % steps) * BLOCKS, tl.where(present, blocks, 0)


@triton.jit
def _down_one(
    h_ptr, ids_ptr, weights_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e, scales_stride, out_ptr,
    P, E, N, K, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, VECTOR: tl.constexpr, EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N. The choices were made two launches ago, so that weights may be read before the wait."""
    n = tl.program_id(0) * BLOCK_N
    n_N = n + tl.arange(0, BLOCK_N)
    row_AN = tl.minimum(n_N, N - 1).to(tl.int64)[None, :]
    blocks = tl.cdiv(K, 128)
    steps = tl.cdiv(blocks, BLOCKS)
    acc_GAN = tl.zeros((BLOCKS * (128 // VECTOR), 1, BLOCK_N), tl.float32)
    pair, expert, block, last = _pair_of(0, steps, ids_ptr, blocks, E, BLOCKS)
    w_GANY = tiles.weight_tile(w_ptr + expert * w_stride_e, row_AN, w_stride, block, last, K, BLOCKS, VECTOR, EVEN_K)
    pdl.wait(PDL)
    pdl.release(PDL)
    for step in range(P * steps):
        following = tl.minimum(step + 1, P * steps - 1)
        next_pair, next_expert, next_block, next_last = _pair_of(following, steps, ids_ptr, blocks, E, BLOCKS)
        next_last = tl.where(step + 1 < P * steps, next_last, 0)
        next_GANY = tiles.weight_tile(
            w_ptr + next_expert * w_stride_e, row_AN, w_stride, next_block, next_last, K, BLOCKS, VECTOR, EVEN_K
        )
        acc_GAN += tl.load(weights_ptr + pair) * tiles.add_product(
            tl.zeros_like(acc_GAN), w_GANY, h_ptr + pair * K, None, 0, scales_ptr + expert * scales_stride_e, n // 128,
            0, scales_stride, block, last, K, BLOCKS, VECTOR, False, False, EVEN_K,
        )  # fmt: skip
        pair, expert, block, last, w_GANY = next_pair, next_expert, next_block, next_last, next_GANY
    tl.store(out_ptr + n_N, tl.sum(tl.sum(acc_GAN, 1), 0), mask=n_N < N)


# Several tokens -------------------------------------------------------------------------------------------------------


@triton.jit
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
    here_P = (id_P >= 0) & (id_P < E)
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


@triton.jit
def _rows(
    x_ptr, x_stride, x_scales_ptr, x_scales_row_stride, x_scales_stride, weights_ptr,
    expert_ptr, rows_ptr, pair_ptr, w_ptr, w_stride_e, w_stride, scales_ptr, scales_stride_e, scales_stride,
    out_ptr, N, K, P, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of N, tiles of pairs. Rows of x are tokens if gated; otherwise pairs, weighted by the router."""
    pdl.wait(PDL)
    pdl.release(PDL)
    tile = tl.program_id(1)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    n = tl.program_id(0) * BLOCK_N
    n_N = n + tl.arange(0, BLOCK_N)
    j_J = tl.arange(0, 2 * BLOCK_N if GATED else BLOCK_N)
    matrix_J = j_J // BLOCK_N * N
    row_J = matrix_J + tl.minimum(n + j_J % BLOCK_N, N - 1)
    slot_M = tl.arange(0, BLOCK_M)
    valid_M = slot_M < tl.load(rows_ptr + tile)
    pair_M = tl.load(pair_ptr + tile * BLOCK_M + slot_M, mask=valid_M, other=0)
    x_row_M = pair_M // P if GATED else pair_M
    out_JM = tiles.rows_product(
        tl.zeros((j_J.shape[0], BLOCK_M), tl.float32), x_ptr, x_row_M, valid_M, x_stride, x_scales_ptr,
        x_scales_row_stride, x_scales_stride, w_ptr + expert * w_stride_e, row_J.to(tl.int64), w_stride,
        scales_ptr + expert * scales_stride_e, (matrix_J + n) // 128, scales_stride, 0, tl.cdiv(K, 128), K,
        QUANTISED, EVEN_K, STAGES,
    )  # fmt: skip
    if GATED:
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(out_JM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        out_NM = tiles.silu_product(gate_NM, up_NM)
    else:
        out_NM = out_JM * tl.load(weights_ptr + pair_M, mask=valid_M, other=0.0)[None, :]
    out_ptrs_NM = out_ptr + (pair_M.to(tl.int64) * N)[None, :] + n_N[:, None]
    tl.store(out_ptrs_NM, out_NM, mask=(n_N < N)[:, None] & valid_M[None, :])


class Config(NamedTuple):
    block_m: int  # 1: the vector kernels
    gate_up_block_n: int
    gate_up_warps: int
    down_block_n: int
    down_warps: int
    stages: int = 1  # of the matrix kernel


def choose(tokens: int, chip: Chip) -> Config:
    if tokens == 1:
        return Config(1, 4, 2, 8, 4)
    block_m = 16 if tokens <= 128 else 32
    return Config(block_m, 64, 4, 64, 4, 5 if chip.shared_memory >= 160 << 10 else 2)


def gate_up(
    x: Codes | torch.Tensor,
    ids_TP: torch.Tensor,
    stack: Stack,
    tiles_of_pairs: Tiles | None,
    config: Config | None = None,
) -> torch.Tensor:
    """silu(gate x) * (up x) of every pair, BF16 [T P, I]; rows of pairs whose expert is not in the stack are undefined.

    ``x``: codes or BF16 [T, D]. ``tiles_of_pairs`` from `group`, or None for one token.
    """
    values_TD = x.codes if isinstance(x, Codes) else x
    chip = chip_of(values_TD.device)
    tokens, hidden = values_TD.shape
    config = config or choose(tokens, chip)
    experts, width = stack.gate_up.shape[0], stack.gate_up.shape[1] // 2
    _check("gate_up", values_TD, stack.gate_up, stack.gate_up_scales, chip)
    check(width % GROUP == 0, "an expert's width must be whole blocks", "gate_up")
    check(ids_TP.is_contiguous() and ids_TP.shape[0] == tokens, f"choices {tuple(ids_TP.shape)}", "gate_up")
    check((tokens == 1) == (tiles_of_pairs is None), "several tokens need tiles, one token none", "gate_up")
    out = torch.empty(ids_TP.numel(), width, dtype=torch.bfloat16, device=values_TD.device)
    w = stack.gate_up if chip.fp8_units else stack.gate_up.view(torch.uint8)
    weight_args = (w, w.stride(0), w.stride(1), stack.gate_up_scales, *stack.gate_up_scales.stride()[:2])
    x_scales, x_scales_strides = (x.scales, x.scales.stride()) if isinstance(x, Codes) else (None, (0, 0))
    common = {
        "QUANTISED": isinstance(x, Codes), "EVEN_K": hidden % GROUP == 0, "PDL": chip.dependent_launch,
        "BLOCK_N": config.gate_up_block_n, **options(chip, config.gate_up_warps),
    }  # fmt: skip
    grid_N = triton.cdiv(width, config.gate_up_block_n)
    if tiles_of_pairs is None:
        _gate_up_one[(grid_N, ids_TP.numel())](
            values_TD, x_scales, x_scales_strides[1], ids_TP, *weight_args, out, experts, width, hidden,
            **row_tile(values_TD, config.gate_up_warps, chip), **common,
        )  # fmt: skip
    else:
        _rows[(grid_N, len(tiles_of_pairs.expert_U))](
            values_TD, values_TD.stride(0), x_scales, *x_scales_strides, None, *tiles_of_pairs, *weight_args, out,
            width, hidden, ids_TP.shape[1], BLOCK_M=config.block_m, GATED=True, STAGES=config.stages,
            **common,
        )  # fmt: skip
    return out


def down(
    h: Codes | torch.Tensor, ids_TP: torch.Tensor, weights_TP: torch.Tensor, stack: Stack,
    tiles_of_pairs: Tiles | None, foreign: bool = False, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """The down projection times the router's weights, FP32 partial results to be added: [1, 1, D] or [T, P, D].

    ``h``: from `gate_up`, BF16 or quantised. ``foreign``: choices outside the stack are other ranks' and add nothing.
    """
    values = h.codes if isinstance(h, Codes) else h
    chip = chip_of(values.device)
    tokens, choices = ids_TP.shape
    config = config or choose(tokens, chip)
    experts, hidden, width = stack.down.shape
    _check("down", values, stack.down, stack.down_scales, chip)
    check(len(values) == ids_TP.numel() and values.is_contiguous(), f"activations {tuple(values.shape)}", "down")
    fits = weights_TP.shape == ids_TP.shape and weights_TP.is_contiguous() and ids_TP.is_contiguous()
    check(fits and weights_TP.dtype == torch.float32, f"weights {tuple(weights_TP.shape)}", "down")
    w = stack.down if chip.fp8_units else stack.down.view(torch.uint8)
    weight_args = (w, w.stride(0), w.stride(1), stack.down_scales, *stack.down_scales.stride()[:2])
    common = {
        "EVEN_K": width % GROUP == 0, "PDL": chip.dependent_launch, "BLOCK_N": config.down_block_n,
        **options(chip, config.down_warps),
    }  # fmt: skip
    grid_N = triton.cdiv(hidden, config.down_block_n)
    if tiles_of_pairs is None:
        check(tokens == 1 and not isinstance(h, Codes), "one token takes BF16 activations", "down")
        out = torch.empty(1, 1, hidden, dtype=torch.float32, device=values.device)
        _down_one[(grid_N,)](
            values, ids_TP, weights_TP, *weight_args, out, choices, experts, hidden, width,
            **row_tile(values, config.down_warps, chip), **common,
        )  # fmt: skip
        return out
    room = torch.zeros if foreign else torch.empty
    out = room(tokens, choices, hidden, dtype=torch.float32, device=values.device)
    h_scales, h_scales_strides = (h.scales, h.scales.stride()) if isinstance(h, Codes) else (None, (0, 0))
    _rows[(grid_N, len(tiles_of_pairs.expert_U))](
        values, values.stride(0), h_scales, *h_scales_strides, weights_TP, *tiles_of_pairs, *weight_args, out,
        hidden, width, choices, BLOCK_M=config.block_m, GATED=False, QUANTISED=isinstance(h, Codes),
        STAGES=config.stages, **common,
    )  # fmt: skip
    return out


def group(ids_TP: torch.Tensor, experts: int, config: Config | None = None) -> Tiles:
    """Tiles of pairs by expert, for several tokens."""
    chip = chip_of(ids_TP.device)
    pairs = ids_TP.numel()
    block_m = (config or choose(ids_TP.shape[0], chip)).block_m
    check(ids_TP.dtype == torch.int32 and ids_TP.is_contiguous(), f"choices in {ids_TP.dtype}", "group")
    check(pairs <= 1 << 14, f"{pairs} pairs in one program", "group")
    limit = min(pairs, min(experts, pairs) + pairs // block_m)
    padded = triton.next_power_of_2(experts)

    def int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_TP.device)

    out = Tiles(int32(limit), int32(limit), int32(limit, block_m))
    _group[(1,)](
        ids_TP, int32(padded), int32(padded), *out, experts, pairs, limit, triton.cdiv(len(ids_TP), block_m),
        PAIRS=triton.next_power_of_2(pairs), EXPERTS=padded, LIMIT=triton.next_power_of_2(limit), BLOCK_M=block_m,
        PDL=chip.dependent_launch, **options(chip, 8),
    )  # fmt: skip
    return out


def _check(name: str, x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, chip: Chip) -> None:
    blocks = (w.shape[0], *(triton.cdiv(size, GROUP) for size in w.shape[1:]))
    check(x.shape[1] == w.shape[2], f"activations {tuple(x.shape)} for experts {tuple(w.shape)}", name)
    check(x.stride(1) == 1 and w.stride(2) == 1, "channels must be contiguous", name)
    check(w.dtype == chip.fp8, f"experts in {w.dtype}", name)
    check(x.dtype in (chip.fp8, torch.bfloat16), f"activations in {x.dtype}", name)
    check(chip.fp8_units or x.dtype == torch.bfloat16, f"{chip.name} takes BF16 activations", name)
    fits = tuple(scales.shape) == blocks and scales.stride(2) == 1 and scales.dtype == torch.float32
    check(fits, f"scales {tuple(scales.shape)} for blocks {blocks}", name)


def gate_up_eager(x: Codes | torch.Tensor, ids_TP: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The twin of `gate_up`, FP32; zero for pairs whose expert is not in the stack."""
    x_TD = dequantise(x) if isinstance(x, Codes) else x.float()
    out = x_TD.new_zeros(*ids_TP.shape, stack.gate_up.shape[1] // 2)
    for t, p in (ids_TP.ge(0) & ids_TP.lt(len(stack.gate_up))).nonzero().tolist():
        e = int(ids_TP[t, p])
        gate, up = (dequantise_weight(stack.gate_up[e], stack.gate_up_scales[e]) @ x_TD[t]).chunk(2)
        out[t, p] = torch.nn.functional.silu(gate) * up
    return out.flatten(0, 1)


def down_eager(h: Codes | torch.Tensor, ids_TP: torch.Tensor, weights_TP: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The twin of `down`, FP32 [T, P, D]."""
    h_TPI = (dequantise(h) if isinstance(h, Codes) else h.float()).view(*ids_TP.shape, -1)
    out = h_TPI.new_zeros(*ids_TP.shape, stack.down.shape[1])
    for t, p in (ids_TP.ge(0) & ids_TP.lt(len(stack.down))).nonzero().tolist():
        e = int(ids_TP[t, p])
        out[t, p] = weights_TP[t, p] * (dequantise_weight(stack.down[e], stack.down_scales[e]) @ h_TPI[t, p])
    return out
