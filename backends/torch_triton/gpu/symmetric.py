"""Memory that the GPUs of a host map of each other: kernels of tensor-parallel ranks send each other small matrices.

Until a few megabytes a library's collective costs its start and its meetings, not its bytes. What goes this way is
compared with a library's result before it is used; where GPUs do not reach each other, or the comparison fails, the
library does it all.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed import _symmetric_memory as symmetric_memory

from ..kernels import gather
from ..kernels.norm import add_norm_quantise
from ..kernels.peers import Peers, allocation_bytes
from ..parallel import Group, ordered_sum
from ..rank import TorchRank

SWITCH = "DEEPSPAN_SMALL_SUMS"  # environment variable; 0: a library does it all
_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # is not used, and not all hosts can give it
_CHANNELS = 7168


def connect(rank: TorchRank, device: torch.device) -> None:
    """Let the tensor-parallel ranks reach each other, where all ranks can. All ranks call this together."""
    group = rank.mesh.tp
    if os.environ.get(SWITCH) == "0" or rank.mesh.grid.tp == 1:
        return
    reason = ""
    try:
        peers = _open(group, device, rank.local_ranks)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    if rank.least(not reason):
        reason = "" if _is_right(peers, group, device) else "what arrives is not what the ranks sent"
        if rank.least(not reason):
            group.peers = peers
            return
    if reason:
        print(f"note: a library adds small matrices, too: rank {rank.rank}: {reason}", file=sys.stderr)


def _open(group: Group, device: torch.device, local_ranks: int) -> Peers:
    """RuntimeError where a GPU does not reach another."""
    if len({rank // local_ranks for rank in group.ranks}) > 1:
        raise RuntimeError("its tensor-parallel group spans hosts")
    assert group.handle is not None, "a group of several ranks has one"
    os.environ.setdefault(_MULTICAST, "1")
    memory_B = symmetric_memory.empty(allocation_bytes(group.size), dtype=torch.uint8, device=device).zero_()
    torch.accelerator.synchronize(device)  # others write into it from here on
    shared = symmetric_memory.rendezvous(memory_B, group.handle)
    addresses_R = torch.tensor(shared.buffer_ptrs, dtype=torch.int64, device=device)
    return Peers(group.index, addresses_R, torch.zeros(2, dtype=torch.int32, device=device), memory_B)


def _is_right(peers: Peers, group: Group, device: torch.device) -> bool:
    """Whether sums and gathered columns, in both rooms, are those of gathered numbers, to the bit."""
    random = torch.Generator(device).manual_seed(group.index)
    weight = torch.ones(_CHANNELS, device=device)
    results = []
    for _ in range(2):
        x_1N = torch.randn(1, _CHANNELS, device=device, generator=random)
        rows_RN = group.below(x_1N.bfloat16(), [1] * group.size)
        total = add_norm_quantise(x_1N, None, weight, 0.0, plain=True, quantise=None, ranks=peers).residual
        assert total is not None, "of several ranks there is a sum"
        results.append(torch.equal(total[0], ordered_sum(rows_RN).bfloat16()))
        joined = gather.beside(x_1N, peers)
        results.append(torch.equal(joined[0], group.below(x_1N, [1] * group.size).flatten()))
    return all(results)
