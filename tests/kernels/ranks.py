"""A group of ranks whose memory is all on one device."""

import torch

from deepspan.backends.torch_triton.kernels.peers import ROOM, Peers, allocation_bytes
from tests.kernels.device import seeded

RANKS = 4


class TwoSteps(Peers):
    """Adds few rows as it does many."""

    def takes(self, words: int) -> bool:
        return False


class Ranks:
    """``rooms``: int32 [ranks that have them, 2 rooms, ranks that send, ROOM, data and launch]."""

    def __init__(self) -> None:
        memory_RB = torch.zeros(RANKS, allocation_bytes(RANKS), dtype=torch.uint8)
        addresses_R = torch.tensor([memory_B.data_ptr() for memory_B in memory_RB])
        self.peers = [
            Peers(rank, addresses_R, torch.zeros(2, dtype=torch.int32), memory_RB) for rank in range(RANKS)
        ]  # fmt: skip
        self.rooms = memory_RB.view(torch.int32).view(RANKS, 2, RANKS, ROOM, 2)

    def have_sent(self, launch: int, words_R: list[torch.Tensor], rank: int, own: bool = False) -> None:
        """The peers of ``rank``, before its launch; whatever else is in its room is poison with the launch's number.

        ``own``: and itself, since in the interpreter none of its programs sees what a later one sends.
        """
        room = self.rooms[rank, launch % 2]
        room[:, :, 0] = 0x7FC07FC0
        room[:, :, 1] = launch
        for source, words in enumerate(words_R):
            if source != rank or own:
                room[source, : len(words), 0] = words
            else:
                room[source, : len(words), 1] = launch - 2

    def assert_sent(self, launch: int, rank: int, words: torch.Tensor) -> None:
        """To every rank; and nothing to other places of the room."""
        for receiver in range(RANKS):
            room = self.rooms[receiver, launch % 2, rank]
            assert torch.equal(room[: len(words), 0], words)
            assert (room[: len(words), 1] == launch).all()
            if receiver != rank:
                assert (room[len(words) :, 1] != launch).all()
        counts = self.peers[rank].counts
        assert counts.tolist() == [launch, 0]


def parts_of(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """By rank, each a tensor of its own: ranks' programs are the same only where their memory is aligned alike."""
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(RANKS)]


def total(parts_R: list[torch.Tensor]) -> torch.Tensor:
    """In FP32, from the first rank to the last, rounded to BF16."""
    sum_ = torch.zeros_like(parts_R[0], dtype=torch.float32)
    for part in parts_R:
        sum_ += part.float()
    return sum_.bfloat16()
