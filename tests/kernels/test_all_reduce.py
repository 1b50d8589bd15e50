"""The sum of several ranks' numbers: one rank beside peers that have come already, and on a GPU all ranks at once."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.all_reduce import BLOCK, BLOCKS, ROOM, Peers, all_reduce, allocation_bytes
from deepspan.models.errors import DeepspanError
from tests.kernels.device import DEVICE, seeded

RANKS = 4
SHAPES = [(1, 7168), (3, 40), (1, BLOCK), (2, 4097), (60, 7168)]
on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="ranks that wait for each other need a GPU")


class Ranks:
    """All of a group, their allocations on one device: numbers [RANKS, 2, ROOM] and flags [RANKS, from, BLOCKS]."""

    def __init__(self) -> None:
        memory_RB = torch.zeros(RANKS, allocation_bytes(RANKS), dtype=torch.uint8)
        addresses_R = torch.tensor([memory_B.data_ptr() for memory_B in memory_RB])
        self.peers = [Peers(rank, addresses_R, torch.zeros(BLOCKS, dtype=torch.int32)) for rank in range(RANKS)]
        self.rooms_R2N = memory_RB[:, : 4 * ROOM].view(torch.bfloat16).view(RANKS, 2, ROOM)
        self.flags_RRB = memory_RB[:, 4 * ROOM :].view(torch.int32).view(RANKS, RANKS, BLOCKS)


def parts_of(shape: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """By rank, each a tensor of its own: ranks' programs are the same only where their memory is aligned alike."""
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(RANKS)]


def total(parts_R: list[torch.Tensor]) -> torch.Tensor:
    """In FP32, from the first rank to the last."""
    sum_ = torch.zeros_like(parts_R[0], dtype=torch.float32)
    for part in parts_R:
        sum_ += part.float()
    return sum_.bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_beside_peers_that_have_come(rank, shape):
    ranks = Ranks()
    for count in (1, 2, 3):
        parts_R = parts_of(shape, count)
        numbers = parts_R[0].numel()
        programs = -(-numbers // BLOCK)
        ranks.rooms_R2N[:, count % 2] = torch.nan
        for peer in set(range(RANKS)) - {rank}:
            ranks.rooms_R2N[peer, count % 2, :numbers] = parts_R[peer].flatten()
            ranks.flags_RRB[:, peer] = count
        x = parts_R[rank].clone()
        all_reduce(x, ranks.peers[rank])
        assert torch.equal(x, total(parts_R))
        assert torch.equal(ranks.rooms_R2N[rank, count % 2, :numbers], parts_R[rank].flatten()), "what peers read"
        assert (ranks.flags_RRB[:, rank, :programs] == count).all(), "what peers wait for"
        assert not ranks.flags_RRB[:, rank, programs:].any()


def at_once(act) -> None:
    """What every rank does, on streams of their own."""
    torch.cuda.synchronize()
    for rank in range(RANKS):
        with torch.cuda.stream(torch.cuda.Stream()):
            act(rank)
    torch.cuda.synchronize()


@on_a_gpu
def test_ranks_at_once():
    """Sums of different sizes one after the other, without a rest between them."""
    ranks = Ranks()
    cases = [parts_of(SHAPES[i % len(SHAPES)], i) for i in range(50)]
    totals = [total(parts_R) for parts_R in cases]
    at_once(lambda rank: [all_reduce(x_R[rank], ranks.peers[rank]) for x_R in cases])
    assert all(torch.equal(x, wanted) for x_R, wanted in zip(cases, totals, strict=True) for x in x_R)


@on_a_gpu
def test_recorded_sums_are_replayed():
    ranks = Ranks()
    x_R = parts_of((2, 7168), 0)
    graphs = [torch.cuda.CUDAGraph() for _ in range(RANKS)]
    at_once(lambda rank: all_reduce(x_R[rank], ranks.peers[rank]))  # compiled before it is recorded
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            for _ in range(3):
                all_reduce(x_R[rank], ranks.peers[rank])
    for seed in range(5):
        wanted_R = parts_of((2, 7168), seed)
        for x, part in zip(x_R, wanted_R, strict=True):
            x.copy_(part)
        for _ in range(3):
            wanted_R = [total(wanted_R)] * RANKS
        at_once(lambda rank: graphs[rank].replay())
        assert all(torch.equal(x, wanted) for x, wanted in zip(x_R, wanted_R, strict=True))


def test_what_it_cannot_take_is_one_clear_error():
    peers = Ranks().peers[0]
    with pytest.raises(DeepspanError, match="torch.float32 of strides .*: kernel all_reduce"):
        all_reduce(torch.zeros(4, 8), peers)
    with pytest.raises(DeepspanError, match="786433 numbers: kernel all_reduce"):
        all_reduce(torch.zeros(ROOM + 1).bfloat16(), peers)
