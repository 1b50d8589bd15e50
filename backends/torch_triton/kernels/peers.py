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
        """Whether a launch may send so many to each rank: they fit, and nothing else is faster."""
        return words * max(1, len(self) - 1) <= ROOM

    def takes_in_two_steps(self, words: int) -> bool:
        """Whether a launch may have so many added in two steps (see `branches`)."""
        return words <= ROOM


def arguments(peers: Peers | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None]:
    """What a kernel takes of ranks, if there are several: addresses, counts and its own rank."""
    return (None, None, None) if peers is None else (peers.addresses_R, peers.counts, peers.rank)


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
    for rank in tl.static_range(RANKS):
        send_to(memories[rank], data, place, mask, number, RANK, RANKS)


@triton.jit
def send_to(memory, data, place, mask, number, RANK, RANKS: tl.constexpr):
    """To the rank that has ``memory``."""
    words = (number.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)
    tl.store(_room(memory, number, RANK, RANKS) + place, words, mask=mask)


@triton.jit
def received(own, place, mask, number, first, skipped, SOURCES: tl.constexpr, RANKS: tl.constexpr):
    """A tuple of the words at ``place`` from each of ``SOURCES`` ranks from ``first`` on, when all are there.

    Data are their lower 32 bits; 0 where masked, and of rank ``skipped``, which is not waited for. ``own``: this rank's
    memory.
    """
    words = _look(own, place, mask, number, first, skipped, SOURCES, RANKS)
    while _lacks(words, number, SOURCES):
        words = _look(own, place, mask, number, first, skipped, SOURCES, RANKS)
    return words


@triton.jit
def received_both(own, place, mask, other_place, other_mask, number, first, SOURCES: tl.constexpr, RANKS: tl.constexpr):
    """As `received` at two places, which are looked at together."""
    words = _look(own, place, mask, number, first, -1, SOURCES, RANKS)
    others = _look(own, other_place, other_mask, number, first, -1, SOURCES, RANKS)
    while _lacks(words, number, SOURCES) | _lacks(others, number, SOURCES):
        words = _look(own, place, mask, number, first, -1, SOURCES, RANKS)
        others = _look(own, other_place, other_mask, number, first, -1, SOURCES, RANKS)
    return words, others


@triton.jit
def _look(own, place, mask, number, first, skipped, SOURCES: tl.constexpr, RANKS: tl.constexpr):
    words_ptr = _room(own, number, first, RANKS) + place
    words = ()
    for source in tl.static_range(SOURCES):
        wanted = mask & (first + source != skipped)
        found = tl.load(words_ptr + source * _ROOM, mask=wanted, other=number.to(tl.int64) << 32, volatile=True)
        words += (found,)  # type: ignore[assignment]
    return words


@triton.jit
def _lacks(words, number, SOURCES: tl.constexpr):
    """Whether one of them is not of this launch."""
    lacking = (words[0] >> 32).to(tl.int32) != number
    for source in tl.static_range(1, SOURCES):
        lacking |= (words[source] >> 32).to(tl.int32) != number
    return tl.max(lacking.to(tl.int32), None) > 0


@triton.jit
def _room(memory, number, source, RANKS: tl.constexpr):
    """Where ``memory`` has what ``source`` sends in this launch. Two words are one access, of which each is whole."""
    memory_ptr = tl.multiple_of(memory.to(tl.pointer_type(tl.int64)), 16)
    return memory_ptr + ((number & 1) * RANKS + source) * _ROOM
