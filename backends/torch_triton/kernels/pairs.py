"""Pairs of a token and its choice, sorted by expert: what products of many tokens run over.

A count, a table and a place for each pair, in launches of their own: nothing is asked of the host, and there are five
of them where a library's sort and what goes with it are two dozen. Which place among its expert's a pair gets is left
to the order of atomic additions: no result depends on it.

Shape letters: T tokens, P choices of a token, R = T P pairs, E experts, U tiles of pairs of one expert, K channels,
G groups of them, W 64-bit words of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options
from .quant import Codes
from .sizes import cdiv, power_of_2

_PAIRS = 1024  # of a program
_TILES = 128
_STEP = tl.constexpr(64)  # sizes of tiles are whole numbers of it
_ROWS = 4


class Sorted(NamedTuple):
    """Pairs sorted by expert, and tiles of them. Pairs of experts that are not here come last, in no tile: what is
    worked out for sorted pairs ends before them.
    """

    pair_R: torch.Tensor  # int32: t P + p
    expert_U: torch.Tensor  # int32; a tile whose expert is not in the stack is not run
    start_U: torch.Tensor  # int32, the tile's first place among the sorted pairs
    rows_U: torch.Tensor  # int32
    own_1: torch.Tensor | None  # int32, how many pairs are of experts that are here; None: all
    place_R: torch.Tensor  # int32: where pair t P + p is among the sorted ones
    ends_E: torch.Tensor  # int32: the place after an expert's last pair

    @property
    def tiles(self) -> tuple[torch.Tensor, ...]:
        """What products read."""
        return self[:4]


@triton.jit
def _expert(ids_ptr, r_R, R, E):
    """Of each pair; E for those of none here."""
    id_R = tl.load(ids_ptr + r_R, mask=r_R < R, other=-1)
    return tl.where((id_R >= 0) & (id_R < E), id_R, E)


@triton.jit(do_not_specialize=["R"])
def _count(ids_ptr, count_ptr, R, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of pairs. ``count_ptr``: zeros."""
    r_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e_E = tl.arange(0, EXPERTS)
    pdl.wait(PDL)
    pdl.release(PDL)
    count_E = tl.histogram(_expert(ids_ptr, r_R, R, E), EXPERTS)
    count_E -= tl.where(e_E == E, tl.sum((r_R >= R).to(tl.int32), 0), 0)
    tl.atomic_add(count_ptr + e_E, count_E, mask=count_E > 0)


@triton.jit(do_not_specialize=["U"])
def _tile(
    count_ptr, next_ptr, expert_ptr, start_ptr, rows_ptr, U, E, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: E experts and one more, for the tiles that are not used."""
    expert = tl.program_id(0)
    e_E = tl.arange(0, EXPERTS)
    u_U = tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.release(PDL)
    count_E = tl.load(count_ptr + e_E, mask=e_E <= E, other=0)
    tiles_E = tl.where(e_E < E, (count_E + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(e_E < expert, count_E, 0), 0)
    tile = tl.sum(tl.where(e_E < expert, tiles_E, 0), 0)
    tl.store(next_ptr + expert, first)
    count = tl.sum(tl.where(e_E == expert, count_E, 0), 0)
    tiles = U - tile if expert == E else (count + BLOCK_M - 1) // BLOCK_M
    size = tl.minimum(tl.cdiv(tl.cdiv(count, tl.maximum(tiles, 1)), _STEP) * _STEP, BLOCK_M)
    for begin in range(0, tiles, BLOCK):
        here_U = begin + u_U < tiles
        place_U = tile + begin + u_U
        done_U = (begin + u_U) * size
        tl.store(expert_ptr + place_U, tl.where(expert == E, -1, expert), mask=here_U)
        tl.store(start_ptr + place_U, first + done_U, mask=here_U)
        tl.store(rows_ptr + place_U, tl.minimum(count - done_U, size), mask=here_U)


@triton.jit(do_not_specialize=["R"])
def _place(ids_ptr, next_ptr, pair_ptr, place_ptr, R, E, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of pairs. ``next_ptr``: first places become those after the last."""
    r_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.release(PDL)
    expert_R = _expert(ids_ptr, r_R, R, E)
    place_R = tl.atomic_add(next_ptr + expert_R, 1, mask=r_R < R)
    tl.store(pair_ptr + place_R, r_R, mask=r_R < R)
    tl.store(place_ptr + r_R, place_R, mask=r_R < R)


def sort_pairs(ids_TP: torch.Tensor, experts: int, block_m: int, foreign: bool = False) -> Sorted:
    """Tiles of up to ``block_m`` pairs with the same expert, experts ascending; an expert's are about equally tall.

    ``foreign``: whether there may be pairs of experts that are not here.
    """
    check(ids_TP.dtype == torch.int32 and ids_TP.is_contiguous(), f"choices in {ids_TP.dtype}", "sort_pairs")
    pairs, device = ids_TP.numel(), ids_TP.device
    chip = chip_of(device)
    used = min(pairs, min(experts, pairs) + pairs // block_m)
    count_E = torch.zeros(experts + 1, dtype=torch.int32, device=device)
    next_E, pair_R, place_R, expert_U, start_U, rows_U = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (experts + 1, pairs, pairs, used, used, used)
    )
    blocks = cdiv(pairs, _PAIRS)
    padded = power_of_2(experts + 1)
    common = {"PDL": chip.dependent_launch, **options(chip, 4)}
    _count[(blocks,)](ids_TP, count_E, pairs, experts, BLOCK=_PAIRS, EXPERTS=padded, **common)
    _tile[(experts + 1,)](
        count_E, next_E, expert_U, start_U, rows_U, used, experts, BLOCK_M=block_m, EXPERTS=padded, BLOCK=_TILES,
        **common,
    )  # fmt: skip
    _place[(blocks,)](ids_TP, next_E, pair_R, place_R, pairs, experts, BLOCK=_PAIRS, **common)
    ends_E = next_E[:experts]
    return Sorted(pair_R, expert_U, start_U, rows_U, ends_E[-1:] if foreign else None, place_R, ends_E)


@triton.jit(do_not_specialize=["R", "scales_stride", "out_scales_stride"])
def _gather(
    words_ptr, words_stride, scales_ptr, scales_row_stride, scales_stride, pair_ptr, own_ptr, out_ptr, out_scales_ptr,
    out_scales_row_stride, out_scales_stride, R, P, W, G, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of sorted pairs, tiles of W, of which the first also has the scales."""
    r_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w_W = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    pdl.wait(PDL)
    pdl.release(PDL)
    if own_ptr is not None:
        R = tl.load(own_ptr)
        if tl.program_id(0) * ROWS >= R:
            return
    token_R = (tl.load(pair_ptr + r_R, mask=r_R < R, other=0) // P).to(tl.int64)
    mask_RW = (r_R < R)[:, None] & (w_W < W)[None, :]
    words_RW = tl.load(words_ptr + (token_R * words_stride)[:, None] + w_W[None, :], mask=mask_RW)
    tl.store(out_ptr + (r_R.to(tl.int64) * W)[:, None] + w_W[None, :], words_RW, mask=mask_RW)
    if scales_ptr is not None:
        g_G = tl.arange(0, BLOCK_G)
        mask_RG = (r_R < R)[:, None] & ((g_G < G) & (tl.program_id(1) == 0))[None, :]
        from_RG = (token_R * scales_row_stride)[:, None] + (g_G * scales_stride)[None, :]
        to_RG = (r_R * out_scales_row_stride)[:, None] + (g_G * out_scales_stride)[None, :]
        tl.store(out_scales_ptr + to_RG, tl.load(scales_ptr + from_RG, mask=mask_RG), mask=mask_RG)


def gather(x: Codes | torch.Tensor, pairs: Sorted, choices: int) -> Codes | torch.Tensor:
    """The tokens' activations [T, K], a row for each sorted pair; scales stay in the order in which they lie.

    Rows of pairs of experts that are not here are undefined.
    """
    values = x.codes if isinstance(x, Codes) else x
    channels = values.shape[1]
    size = channels * values.element_size()
    check(values.stride(1) == 1 and size % 8 == 0, f"rows of {size} bytes", "gather")
    rows, device, chip = len(pairs.pair_R), values.device, chip_of(values.device)
    out = torch.empty(rows, channels, dtype=values.dtype, device=device)
    scales, out_scales, groups = None, None, 0
    strides: tuple[int, ...] = (0, 0)
    out_strides: tuple[int, ...] = (0, 0)
    if isinstance(x, Codes):
        scales, groups = x.scales, x.scales.shape[1]
        out_scales = torch.empty(groups, rows, dtype=torch.float32, device=device).t()
        strides, out_strides = scales.stride(), out_scales.stride()
    words, out_words = values.view(torch.int64), out.view(torch.int64)
    width = words.shape[1]
    block_w = min(1024, power_of_2(width))
    _gather[(cdiv(rows, _ROWS), cdiv(width, block_w))](
        words, words.stride(0), scales, *strides, pairs.pair_R, pairs.own_1, out_words, out_scales, *out_strides, rows,
        choices, width, groups, ROWS=_ROWS, BLOCK_W=block_w, BLOCK_G=power_of_2(max(1, groups)),
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out if out_scales is None else Codes(out, out_scales)
