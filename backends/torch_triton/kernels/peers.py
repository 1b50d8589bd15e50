"""What the ranks of a host send each other inside kernels, through memory that their GPUs map of each other.

A word of 64 bits carries 32 of data and the number of the launch that sent them. A reader asks again until it sees its
own launch's number, so that nothing is fenced and no flag is sent behind the data: it takes one way over the link.
Launches use two rooms in turn. A rank that is two launches ahead has seen what this rank sent one launch later than
what a room still holds, hence after this rank had read it.

A rank's allocation, which all ranks map: two rooms of `ROOM` words for every rank that sends.
Sources: the "LL" protocol of NCCL; PTX ISA, memory consistency model (an aligned access of 64 bits is never split).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ROOM = 1 << 19
_ROOM = tl.constexpr(ROOM)


@dataclass(frozen=True)
class Peers:
    """The allocations of a group as one rank sees them; ``memory``, its own, is all zeros before the first launch."""

    rank: int
    addresses_R: torch.Tensor  # int64, by rank
    counts: torch.Tensor  # int32 [2], zeros at first: launches, and programs of one that have come
    memory: torch.Tensor

    def __len__(self) -> int:
        return len(self.addresses_R)

    def takes(self, words: int) -> bool:
        """Whether a launch may send so many to each rank: they fit, and a library is not faster."""
        return words * max(1, len(self) - 1) <= ROOM


def allocation_bytes(ranks: int) -> int:
    """Of a rank."""
    return 2 * ranks * ROOM * 8


@triton.jit
def addresses(address_ptr, RANKS: tl.constexpr):
    """Of all ranks' memories, as a tuple."""
    found = ()
    for rank in tl.static_range(RANKS):
        found += (tl.load(address_ptr + rank),)  # type: ignore[assignment]
    return found


@triton.jit
def launch_number(counts_ptr):
    """From 1 on. May be asked before waiting for the kernel ahead: two launches that send never follow each other.

    After 2^32 of them, 0 and 1 are left out: 0 is what fresh memory holds, and rooms go on taking turns.
    """
    launches = tl.atomic_add(counts_ptr, 0, sem="relaxed")
    return tl.where(launches == -1, 2, launches + 1)


@triton.jit
def count_launch(counts_ptr, number, programs):
    """The last of a launch's programs to come here, which all know its number then, counts it."""
    if tl.atomic_add(counts_ptr + 1, 1, sem="relaxed") == programs - 1:
        tl.store(counts_ptr + 1, 0)
        tl.store(counts_ptr, number)


@triton.jit
def send(memories, data, place, mask, number, RANK, RANKS: tl.constexpr):
    """``data``, of 32 bits, to all ranks and to this one itself, at ``place``."""
    words = (number.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)
    room = ((number & 1) * RANKS + RANK) * _ROOM
    for rank in tl.static_range(RANKS):
        room_ptr = memories[rank].to(tl.pointer_type(tl.int64)) + room
        tl.store(room_ptr + place, words, mask=mask)


@triton.jit
def received(own, place, mask, number, source, RANKS: tl.constexpr):
    """The 32 bits that rank ``source`` sent to ``place``, when they are there; 0 where masked. ``own``: the memory."""
    words_ptr = own.to(tl.pointer_type(tl.int64)) + ((number & 1) * RANKS + source) * _ROOM + place
    words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
    while tl.max((mask & ((words >> 32).to(tl.int32) != number)).to(tl.int32)) > 0:
        words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
    return words.to(tl.int32)
