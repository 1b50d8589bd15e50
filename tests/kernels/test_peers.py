"""What ranks send each other: a rank beside peers that have come already, and on a GPU all ranks at once."""

import functools

import pytest
import torch

from deepspan.backends.torch_triton.kernels import best as best_kernel
from deepspan.backends.torch_triton.kernels import gather, norm
from deepspan.models.errors import DeepspanError
from tests.kernels.device import DEVICE
from tests.kernels.ranks import RANKS, Ranks, TwoSteps, parts_of, total
from tests.kernels.rows import poisoned

SHAPES = [(1, 7168), (3, 40), (1, gather.BLOCK_V), (2, 4098), (4, 2048)]  # few programs: all ranks' have room at once
on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="ranks that wait for each other need a GPU")


@pytest.mark.parametrize("shape", [(1, 5000), (3, 41), (2, gather.BLOCK_V)])
@pytest.mark.parametrize("rank", [0, 3])
def test_columns_of_ranks_beside_each_other(rank, shape):
    ranks = Ranks()
    for launch in (1, 2, 3):
        x_R = parts_of(shape, launch, torch.float32)
        words_R = [x.view(torch.int32).flatten() for x in x_R]
        ranks.have_sent(launch, words_R, rank)
        got = gather.beside(poisoned(x_R[rank]), ranks.peers[rank])
        assert torch.equal(got, torch.cat(x_R, dim=1))
        ranks.assert_sent(launch, rank, words_R[rank])


def test_no_launch_has_the_number_that_fresh_memory_holds():
    ranks = Ranks()
    ranks.peers[0].counts[0] = -1
    x_R = parts_of((1, 40), 0, torch.float32)
    words_R = [x.view(torch.int32).flatten() for x in x_R]
    ranks.have_sent(2, words_R, 0)
    assert torch.equal(gather.beside(x_R[0], ranks.peers[0]), torch.cat(x_R, dim=1))
    ranks.assert_sent(2, 0, words_R[0])


def test_what_has_no_room_is_one_clear_error():
    peers = Ranks().peers[0]
    assert gather.takes(torch.empty(5, 32320, device="meta"), peers)
    with pytest.raises(DeepspanError, match=r"\(6, 32320\) of torch.float32 for 4 ranks: kernel beside"):
        gather.beside(torch.zeros(6, 32320), peers)
    with pytest.raises(DeepspanError, match="of torch.bfloat16 for 4 ranks: kernel beside"):
        gather.beside(torch.zeros(1, 8).bfloat16(), peers)


@functools.cache
def streams() -> list:
    return [torch.cuda.Stream() for _ in range(RANKS)]


def at_once(act) -> None:
    """What every rank does, on streams of their own."""
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams()):
        with torch.cuda.stream(stream):
            act(rank)
    torch.cuda.synchronize()


def sum_of(x: torch.Tensor, peers) -> torch.Tensor:
    """In two steps, where every rank has a row."""
    weight = torch.ones(x.shape[1], device=x.device)
    peers = TwoSteps(**vars(peers)) if len(x) >= RANKS else peers
    return norm.add_norm_quantise(x, None, weight, 1e-6, plain=True, quantise=None, ranks=peers).residual


@on_a_gpu
def test_ranks_at_once(monkeypatch):
    """Sums of different sizes, best and gathered columns one after the other, without a rest between them."""
    ranks = Ranks()
    cases = [parts_of(SHAPES[i % len(SHAPES)], i) for i in range(50)]
    counters = [torch.zeros(100, dtype=torch.int32) for _ in range(RANKS)]  # a device of one rank has one set

    def best(x, rank):
        monkeypatch.setattr(best_kernel, "counters", lambda device: counters[rank])
        return best_kernel.best(x.float(), ranks=ranks.peers[rank])

    def joined(x, rank):
        return gather.beside(x.float(), ranks.peers[rank])

    def calls(x):
        return [lambda x, rank: sum_of(x, ranks.peers[rank]), best, *([joined] if x.numel() < 10000 else [])]

    def run(rank, steps):
        """Between what sends are copies, as in a model other kernels are."""
        for number, call in steps:
            results[number, call][rank] = calls(cases[number][rank])[call](cases[number][rank], rank).clone()

    steps = [(number, call) for number, x_R in enumerate(cases) for call in range(len(calls(x_R[0])))]
    # First one at a time: a kernel that is loaded, or memory that is taken, for the first time waits for all that runs,
    # and what runs waits for ranks that have not been launched.
    for together in ([[step] for step in steps], [steps]):
        results = {step: [None] * RANKS for step in steps}
        for some in together:
            at_once(lambda rank, some=some: run(rank, some))
        for (number, call), got_R in results.items():
            x_R = cases[number]
            logits = torch.cat(x_R, 1).float()
            wanted = (total(x_R), logits.argmax(dim=1).int(), logits)[call]
            assert all(torch.equal(got, wanted) for got in got_R)


@on_a_gpu
def test_recorded_sums_are_replayed():
    ranks = Ranks()
    x_R = parts_of((2, 7168), 0)
    graphs = [torch.cuda.CUDAGraph() for _ in range(RANKS)]
    at_once(lambda rank: sum_of(x_R[rank], ranks.peers[rank]))  # compiled before it is recorded
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            for _ in range(3):
                x_R[rank].copy_(sum_of(x_R[rank], ranks.peers[rank]))
    for seed in range(5):
        wanted_R = parts_of((2, 7168), seed)
        for x, part in zip(x_R, wanted_R, strict=True):
            x.copy_(part)
        for _ in range(3):
            wanted_R = [total(wanted_R)] * RANKS
        at_once(lambda rank: graphs[rank].replay())
        assert all(torch.equal(x, wanted) for x, wanted in zip(x_R, wanted_R, strict=True))
