"""The best token of each row of logits: rows are long and few, so several programs share one.

Of a vocabulary that ranks share, each sends the others the best of its part: two words a row, not all logits.

Shape letters: O rows, V columns of this rank, S shares of a row, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pdl, peers, tiles
from .chips import check, chip_of, counters, options
from .peers import Peers
from .sizes import cdiv, power_of_2

BLOCK_V = 4096
_MOST_SHARES = 32


class Copies(NamedTuple):
    """Where the host reads the tokens of steps that take turns."""

    token_ids_WO: torch.Tensor  # int32, in pinned memory: turns W
    turn: torch.Tensor  # int32 [1], on the device


@triton.jit(do_not_specialize=["V", "RANK"])
def _best(
    logits_ptr, stride, share_ptr, index_ptr, counter_ptr, names_ptr, out_ptr, copies_ptr, turn_ptr, V, address_ptr,
    counts_ptr, RANK, RANKS: tl.constexpr, SHARES: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: rows, shares. The last program of a row to finish compares the shares' best, and those of the ranks."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    if RANKS > 1:
        number = peers.launch_number(counts_ptr)
        memories, own = peers.addresses(address_ptr, RANKS), tl.load(address_ptr + RANK)
    pdl.wait(PDL)
    pdl.release(PDL)
    span = tl.cdiv(V, SHARES)
    end = tl.minimum(share * span + span, V)
    value = tl.full((), float("-inf"), tl.float32)
    index = tl.full((), 0, tl.int32) + share * span
    for v in range(share * span, end, BLOCK_V):
        v_V = v + tl.arange(0, BLOCK_V)
        logits_V = tl.load(logits_ptr + row * stride + v_V, mask=v_V < end, other=float("-inf"))
        here, at = tl.max(logits_V, 0, return_indices=True)
        index = tl.where(here > value, v + at, index)
        value = tl.maximum(value, here)
    tl.store(share_ptr + row * SHARES + share, value)
    tl.store(index_ptr + row * SHARES + share, index)
    if tiles.is_last(counter_ptr + row, SHARES):
        s_S = tl.arange(0, SHARES)
        value_S = tl.load(share_ptr + row * SHARES + s_S, cache_modifier=".cg")
        index_S = tl.load(index_ptr + row * SHARES + s_S, cache_modifier=".cg")
        most = tl.max(value_S, 0)
        token = tl.min(tl.where(value_S == most, index_S, V), 0)
        if RANKS > 1:
            token = _best_of_ranks(most, token, row, V, memories, own, counts_ptr, number, RANK, RANKS)
        if names_ptr is not None:
            token = tl.load(names_ptr + row * V + token)
        tl.store(out_ptr + row, token)
        if copies_ptr is not None:
            tl.store(copies_ptr + tl.load(turn_ptr) * tl.num_programs(0) + row, token)


@triton.jit
def _best_of_ranks(most, token, row, V, memories, own, counts_ptr, number, RANK, RANKS: tl.constexpr):
    """The token of the vocabulary with the largest logit, the lower of equal ones."""
    w_W = tl.arange(0, 2)
    data_W = tl.where(w_W == 0, most.to(tl.int32, bitcast=True), RANK * V + token)
    peers.send(memories, data_W, 2 * row + w_W, w_W < 2, number, RANK, RANKS)
    peers.count_launch(counts_ptr, number, tl.num_programs(0))
    found = peers.received(own, 2 * row + w_W, w_W < 2, number, 0, -1, RANKS, RANKS)
    for rank in tl.static_range(RANKS):
        found_W = found[rank].to(tl.int32)
        logit = tl.sum(tl.where(w_W == 0, found_W, 0), 0).to(tl.float32, bitcast=True)
        of_rank = tl.sum(tl.where(w_W == 1, found_W, 0), 0)
        if rank == 0:
            best_token = of_rank
            best_logit = logit
        else:
            best_token = tl.where(logit > best_logit, of_rank, best_token)
            best_logit = tl.maximum(best_logit, logit)
    return best_token


def takes(logits_OV: torch.Tensor, ranks: Peers) -> bool:
    """Whether ranks may compare so many rows: a program of each waits for the other ranks'."""
    return len(logits_OV) <= 4 * chip_of(logits_OV.device).processors and ranks.takes(2 * len(logits_OV))


def best(
    logits_OV: torch.Tensor,
    out_O: torch.Tensor | None = None,
    copies: Copies | None = None,
    ranks: Peers | None = None,
    names_OV: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 [O]: the column of the largest of float32 logits; the lower of equal ones. In ``out_O``, if given.

    ``copies``: written, too, which takes less time than another launch. ``ranks``: whose parts of the vocabulary, each
    as many columns, are beside each other; all of them call this, and one that never does is waited for. ``names_OV``:
    int32, what is written of a column instead of its number.
    """
    check(logits_OV.dtype == torch.float32 and logits_OV.stride(1) == 1, f"logits in {logits_OV.dtype}", "best")
    rows, device = len(logits_OV), logits_OV.device
    check(rows <= len(counters(device)), f"{rows} rows", "best")
    check(ranks is None or takes(logits_OV, ranks), f"{rows} rows between ranks", "best")
    shares = min(_MOST_SHARES, power_of_2(cdiv(logits_OV.shape[1], BLOCK_V)))
    values = torch.empty(rows, shares, dtype=torch.float32, device=device)
    indices = torch.empty(rows, shares, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int32, device=device) if out_O is None else out_O
    check(out.shape == (rows,) and out.is_contiguous(), f"room for {tuple(out.shape)} tokens", "best")
    named = names_OV is None or (names_OV.shape == logits_OV.shape and names_OV.is_contiguous())
    check(named, "names must be contiguous, one for each logit", "best")
    check(copies is None or copies.token_ids_WO.shape[1] == rows, f"copies of other than {rows} tokens", "best")
    chip = chip_of(device)
    _best[(rows, shares)](
        logits_OV, logits_OV.stride(0), values, indices, counters(device), names_OV, out, *(copies or (None, None)),
        logits_OV.shape[1], *peers.arguments(ranks), RANKS=1 if ranks is None else len(ranks), SHARES=shares,
        BLOCK_V=BLOCK_V, PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out
