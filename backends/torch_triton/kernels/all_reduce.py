"""The sum of all ranks' small matrices in one launch: every rank reads every other's memory.

A rank copies its block into its own room, tells every other rank by a flag, waits for theirs, and adds all blocks in
FP32 in the order of the ranks, rounded once: all ranks get the same bits. Rooms are two, used in turn: who has seen a
rank's flag of one sum knows that it has finished reading for the sum before, so a sum needs only one meeting. Counts
live on the device, so that recorded graphs replay.

A rank's allocation, which all ranks map: two rooms of `ROOM` numbers, then int32 flags [RANKS, BLOCKS].
Source: PTX ISA, memory consistency model (release and acquire patterns at system scope).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options
from .sizes import cdiv, power_of_2

BLOCK = 2048
BLOCKS = 384  # few enough for all of a chip's programs to wait at a time
ROOM = BLOCK * BLOCKS
_WARPS = 4
_BLOCKS = tl.constexpr(BLOCKS)
_ROOM = tl.constexpr(ROOM)
_FLAGS = tl.constexpr(2 * ROOM * 2)  # bytes before them


def allocation_bytes(ranks: int) -> int:
    """Of a rank; all zeros before the first sum."""
    return 2 * ROOM * 2 + ranks * BLOCKS * 4


@dataclass(frozen=True)
class Peers:
    """The allocations of a group as one rank sees them."""

    rank: int
    addresses_R: torch.Tensor  # int64, by rank
    counts_B: torch.Tensor  # int32 [BLOCKS], zeros at first: the sums that each program has taken part in

    def __len__(self) -> int:
        return len(self.addresses_R)


@triton.jit(do_not_specialize=["N", "RANK"])
def _all_reduce(
    x_ptr, address_ptr, count_ptr, N, RANK, RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of x, which becomes the sum."""
    b = tl.program_id(0)
    i_I = b * BLOCK + tl.arange(0, BLOCK)
    rank_R = tl.arange(0, BLOCK_R)
    is_R = rank_R < RANKS
    flags_R = (tl.load(address_ptr + rank_R, mask=is_R, other=0) + _FLAGS).to(tl.pointer_type(tl.int32))
    own = tl.load(address_ptr + RANK)
    own_flags_R = (own + _FLAGS).to(tl.pointer_type(tl.int32)) + rank_R * _BLOCKS + b
    pdl.wait(PDL)
    pdl.release(PDL)
    count = tl.load(count_ptr + b) + 1
    room = (count & 1) * _ROOM
    x_I = tl.load(x_ptr + i_I, mask=i_I < N, other=0.0)
    tl.store(own.to(tl.pointer_type(tl.bfloat16)) + room + i_I, x_I)
    tl.debug_barrier()  # all threads have written
    tl.atomic_xchg(flags_R + RANK * _BLOCKS + b, count, mask=is_R, sem="release", scope="sys")
    awaited = RANKS
    while awaited > 0:
        seen_R = tl.atomic_add(own_flags_R, 0, mask=is_R, sem="acquire", scope="sys")
        awaited = tl.sum((is_R & (seen_R - count < 0)).to(tl.int32))
    tl.debug_barrier()  # no thread reads before all ranks have come
    sum_I = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        room_ptr = tl.load(address_ptr + rank).to(tl.pointer_type(tl.bfloat16)) + room
        sum_I += tl.load(room_ptr + i_I, cache_modifier=".cv").to(tl.float32)
    tl.store(x_ptr + i_I, sum_I.to(tl.bfloat16), mask=i_I < N)
    tl.store(count_ptr + b, count)


def all_reduce(x: torch.Tensor, peers: Peers) -> None:
    """Make ``x``, BF16 and contiguous, of at most `ROOM` numbers, the sum of the ranks' ``x``, alike on all.

    Every rank of the group calls this with as many numbers, in the same order. A rank that never comes is waited for.
    """
    check(x.dtype == torch.bfloat16 and x.is_contiguous(), f"{x.dtype} of strides {x.stride()}", "all_reduce")
    check(x.numel() <= ROOM, f"{x.numel()} numbers", "all_reduce")
    chip = chip_of(x.device)
    _all_reduce[(cdiv(x.numel(), BLOCK),)](
        x, peers.addresses_R, peers.counts_B, x.numel(), peers.rank, RANKS=len(peers),
        BLOCK_R=power_of_2(len(peers)), BLOCK=BLOCK, PDL=chip.dependent_launch, **options(chip, _WARPS),
    )  # fmt: skip
