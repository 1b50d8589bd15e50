"""Small sums over memory that the GPUs of a host read of each other: a launch of our own in place of the library's.

Until about a megabyte the library's all-reduce costs its start, not its bytes. Sums are compared with gathered ones
before they are used; where GPUs do not reach each other, or the comparison fails, the library sums.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from ..kernels.all_reduce import BLOCKS, ROOM, Peers, all_reduce, allocation_bytes
from ..parallel import Group, ordered_sum
from ..rank import TorchRank

SWITCH = "DEEPSPAN_SMALL_SUMS"  # environment variable; 0: the library sums
_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # is not used, and not all hosts can give it


class SmallSum:
    """Sums over the ranks of ``handle``, whose GPUs ``device`` are in one host. All its ranks make it together.

    RuntimeError where a GPU does not reach another.
    """

    def __init__(self, handle: dist.ProcessGroup, device: torch.device):
        os.environ.setdefault(_MULTICAST, "1")
        size = handle.size()
        self._memory_B = symmetric_memory.empty(allocation_bytes(size), dtype=torch.uint8, device=device).zero_()
        torch.accelerator.synchronize(device)  # others write into it from here on
        shared = symmetric_memory.rendezvous(self._memory_B, handle)
        addresses_R = torch.tensor(shared.buffer_ptrs, dtype=torch.int64, device=device)
        self._peers = Peers(handle.rank(), addresses_R, torch.zeros(BLOCKS, dtype=torch.int32, device=device))
        self._most = ROOM // max(1, size - 1)  # numbers: what a rank reads of others fits a room

    def takes(self, x: Tensor) -> bool:
        return x.dtype == torch.bfloat16 and x.is_contiguous() and x.numel() <= self._most

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, which becomes the sum."""
        all_reduce(x, self._peers)
        return x


def connect(rank: TorchRank, device: torch.device) -> None:
    """Let the tensor-parallel ranks add small matrices so, where all ranks can. All ranks call this together."""
    group = rank.mesh.tp
    if os.environ.get(SWITCH) == "0" or rank.mesh.grid.tp == 1:
        return
    reason = ""
    try:
        small_sum = _open(group, device, rank.local_ranks)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    if rank.least(not reason):
        reason = "" if _is_right(small_sum, group, device) else "the sum is not that of the ranks' numbers"
        if rank.least(not reason):
            group.small_sum = small_sum
            return
    if reason:
        print(f"note: the library adds small matrices, too: rank {rank.rank}: {reason}", file=sys.stderr)


def _open(group: Group, device: torch.device, local_ranks: int) -> SmallSum:
    if len({rank // local_ranks for rank in group.ranks}) > 1:
        raise RuntimeError("its tensor-parallel group spans hosts")
    assert group.handle is not None, "a group of several ranks has one"
    return SmallSum(group.handle, device)


def _is_right(small_sum: SmallSum, group: Group, device: torch.device) -> bool:
    """Whether sums in both rooms are those of gathered numbers, to the bit."""
    random = torch.Generator(device).manual_seed(group.index)
    results = []
    for _ in range(4):
        x_1N = torch.randn(1, 7168, device=device, generator=random).bfloat16()
        expected_N = ordered_sum(group.below(x_1N, [1] * group.size)).bfloat16()
        results.append(torch.equal(small_sum(x_1N)[0], expected_N))
    return all(results)
