"""The sum of tensor-parallel ranks' branches, as functions for the kernel of the next norm.

In one step every rank sends its branch to all, which add: the shortest way. In two, for more rows, each row has an
owner, which alone is sent its branches, and sends their sum: half the words between four ranks, a quarter between
eight. Branches travel in BF16, are added in FP32 in the order of the ranks, and the sum is rounded to BF16.

Shape letters: G groups of 128 channels, W words of two of a group's channels.
"""

import triton
import triton.language as tl

from . import peers

_HELD = 4  # ranks' words: a program's registers do not hold more


def together(ranks: int) -> int:
    """Of how many ranks a program asks for words at a time."""
    return _HELD if ranks % _HELD == 0 else ranks


@triton.jit
def parts(branch_ptr, branch_stride_p, k, K, P: tl.constexpr):
    """The sum of the branch's parts at channels ``k``, of any shape."""
    x = tl.load(branch_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    for p in tl.static_range(1, P):
        x += tl.load(branch_ptr + p * branch_stride_p + k, mask=k < K, other=0.0).to(tl.float32)
    return x


@triton.jit
def ranks_sum(
    branch_ptr, branch_stride_p, all_G, part_G, t, K, address_ptr, counts_ptr, memories, own, number, P: tl.constexpr,
    RANK, RANKS: tl.constexpr, TOGETHER: tl.constexpr, TWO_STEPS: tl.constexpr,
):  # fmt: skip
    """Of row ``t``, in FP32 [G, 128]: the groups ``all_G``, and ``part_G``, which this program sends or adds.

    ``branch_ptr``: this rank's branch of the row. ``memories``, ``own``, ``number``: see `peers`.
    """
    place_GW, mask_GW = _words(part_G, t, K)
    all_place_GW, all_mask_GW = _words(all_G, t, K)
    k_GW2 = (part_G[:, None] * 64 + tl.arange(0, 64)[None, :])[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    branch_GW = _packed(*tl.split(parts(branch_ptr, branch_stride_p, k_GW2, K, P)))
    if TWO_STEPS:
        owner = (t % RANKS).to(tl.int32)
        if owner == RANK:
            sum_GW = _owners_sum(own, place_GW, mask_GW, number, branch_GW, RANK, RANKS, TOGETHER)
            peers.send(memories, sum_GW, place_GW, mask_GW, number, RANK, RANKS)
        else:
            peers.send_to(tl.load(address_ptr + owner), branch_GW, place_GW, mask_GW, number, RANK, RANKS)
    else:
        owner = 0
        peers.send(memories, branch_GW, place_GW, mask_GW, number, RANK, RANKS)
    peers.count_launch(counts_ptr, number, tl.num_programs(0))
    SOURCES: tl.constexpr = 1 if TWO_STEPS else RANKS
    LOOKED: tl.constexpr = 1 if TWO_STEPS else TOGETHER
    all_sum, part_sum = _zeros(all_mask_GW), _zeros(mask_GW)
    for first in tl.static_range(0, SOURCES, LOOKED):
        if all_G.shape == part_G.shape:
            found = peers.received(own, place_GW, mask_GW, number, owner + first, -1, LOOKED, RANKS)
        else:
            found, in_part = peers.received_both(
                own, all_place_GW, all_mask_GW, place_GW, mask_GW, number, owner + first, LOOKED, RANKS
            )
            part_sum = _add(part_sum, in_part, LOOKED)
        all_sum = _add(all_sum, found, LOOKED)
    all_GX = _channels(all_sum)
    part_GX = all_GX if all_G.shape == part_G.shape else _channels(part_sum)
    return all_GX, part_GX


@triton.jit
def _owners_sum(own, place_GW, mask_GW, number, branch_GW, RANK, RANKS: tl.constexpr, TOGETHER: tl.constexpr):
    """Words of the sum of what all ranks send this one, which sends itself none."""
    total = _zeros(mask_GW)
    for first in tl.static_range(0, RANKS, TOGETHER):
        found = peers.received(own, place_GW, mask_GW, number, first, RANK, TOGETHER, RANKS)
        words = ()
        for i in tl.static_range(TOGETHER):
            words += (tl.where(first + i == RANK, branch_GW, found[i].to(tl.int32)),)  # type: ignore[assignment]
        total = _add(total, words, TOGETHER)
    return _packed(*total)


@triton.jit
def _words(group_G, t, K):
    """Where the words of groups of row ``t`` are in a room, and which exist."""
    w_GW = group_G[:, None] * 64 + tl.arange(0, 64)[None, :]
    return t * (K // 2) + w_GW, w_GW < K // 2


@triton.jit
def _packed(first_GW, second_GW):
    """Rounded to BF16, two channels a word."""
    first_GW = first_GW.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    second_GW = second_GW.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return first_GW | second_GW


@triton.jit
def _unpacked(word_GW):
    word_GW = word_GW.to(tl.int32)
    return (word_GW << 16).to(tl.float32, bitcast=True), (word_GW & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _zeros(mask_GW):
    return tl.zeros(mask_GW.shape, tl.float32), tl.zeros(mask_GW.shape, tl.float32)


@triton.jit
def _add(total, words, COUNT: tl.constexpr):
    """Words of several ranks to the sums of their first and second channels."""
    first_GW, second_GW = total
    for i in tl.static_range(COUNT):
        next_first_GW, next_second_GW = _unpacked(words[i])
        first_GW += next_first_GW
        second_GW += next_second_GW
    return first_GW, second_GW


@triton.jit
def _channels(total):
    """FP32 [G, 128], rounded to BF16."""
    first_GW, second_GW = total
    sum_GX = tl.reshape(tl.join(first_GW, second_GW), (first_GW.shape[0], 128))
    return sum_GX.to(tl.bfloat16).to(tl.float32)
