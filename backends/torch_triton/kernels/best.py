"""The best token of each row of logits: rows are long and few, so several programs share one.

Shape letters: O rows, V columns, S shares of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import check, chip_of, counters, options

BLOCK_V = 4096
_SHARES = 32


@triton.jit(do_not_specialize=["V"])
def _best(
    logits_ptr, stride, share_ptr, index_ptr, counter_ptr, out_ptr, V, SHARES: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: rows, shares. The last program of a row to finish compares the shares' best."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
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
        tl.store(out_ptr + row, tl.min(tl.where(value_S == tl.max(value_S, 0), index_S, V), 0))


def best(logits_OV: torch.Tensor) -> torch.Tensor:
    """int32 [O]: the column of the largest of float32 logits; the lower of equal ones."""
    check(logits_OV.dtype == torch.float32 and logits_OV.stride(1) == 1, f"logits in {logits_OV.dtype}", "best")
    rows, device = len(logits_OV), logits_OV.device
    values = torch.empty(rows, _SHARES, dtype=torch.float32, device=device)
    indices = torch.empty(rows, _SHARES, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int32, device=device)
    check(rows <= len(counters(device)), f"{rows} rows", "best")
    chip = chip_of(device)
    _best[(rows, _SHARES)](
        logits_OV, logits_OV.stride(0), values, indices, counters(device), out, logits_OV.shape[1], SHARES=_SHARES,
        BLOCK_V=BLOCK_V, PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out
