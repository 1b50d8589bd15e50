"""The ranks' columns beside each other, in one launch: a vocabulary's logits, of which each rank computes a part.

Shape letters: T rows, V columns of a rank, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl
from . import peers as words
from .chips import check, chip_of, options
from .peers import Peers
from .sizes import cdiv

BLOCK_V = 2048


@triton.jit(do_not_specialize=["RANK"])
def _beside(
    x_ptr, x_stride, address_ptr, counts_ptr, out_ptr, T, V, RANK, RANKS: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of V, rows. A program waits for the same tile of all ranks."""
    t = tl.program_id(1)
    v_V = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_V = v_V < V
    place_V = t * V + v_V
    number = words.launch_number(counts_ptr)
    memories, own = words.addresses(address_ptr, RANKS), tl.load(address_ptr + RANK)
    pdl.wait(PDL)
    pdl.release(PDL)
    x_V = tl.load(x_ptr + t.to(tl.int64) * x_stride + v_V, mask=mask_V, other=0.0)
    words.send(memories, x_V.to(tl.int32, bitcast=True), place_V, mask_V, number, RANK, RANKS)
    words.count_launch(counts_ptr, number, tl.num_programs(0) * tl.num_programs(1))
    out_ptr += t.to(tl.int64) * V * RANKS
    found = words.received(own, place_V, mask_V, number, 0, -1, RANKS, RANKS)
    for rank in tl.static_range(RANKS):
        tl.store(out_ptr + rank * V + v_V, found[rank].to(tl.int32).to(tl.float32, bitcast=True), mask=mask_V)


def takes(x_TV: torch.Tensor, peers: Peers) -> bool:
    return x_TV.dim() == 2 and x_TV.dtype == torch.float32 and x_TV.stride(1) == 1 and peers.takes(x_TV.numel())


def beside(x_TV: torch.Tensor, peers: Peers) -> torch.Tensor:
    """float32 [T, R V] of every rank's float32 [T, V], on all ranks. All ranks call this with as many rows."""
    check(takes(x_TV, peers), f"{tuple(x_TV.shape)} of {x_TV.dtype} for {len(peers)} ranks", "beside")
    rows, columns = x_TV.shape
    chip = chip_of(x_TV.device)
    out = torch.empty(rows, columns * len(peers), dtype=torch.float32, device=x_TV.device)
    _beside[(cdiv(columns, BLOCK_V), rows)](
        x_TV, x_TV.stride(0), peers.addresses_R, peers.counts, out, rows, columns, peers.rank, RANKS=len(peers),
        BLOCK_V=BLOCK_V, PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out
