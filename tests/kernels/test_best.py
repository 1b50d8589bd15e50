"""The best token of each row is what argmax gives, ties included; of ranks, one beside peers that have come already."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.best import Copies, best
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded
from tests.kernels.ranks import RANKS, Ranks


@pytest.mark.parametrize("columns", [5, 129, 9000])
def test_is_the_first_of_the_largest(columns):
    generator = seeded(columns)
    logits = torch.randint(-4, 4, (3, columns + 3), generator=generator).float()[:, :columns]
    logits[1] = -torch.inf
    logits[2, -1] = 9
    assert best(logits).tolist() == logits.argmax(dim=1).tolist()


def test_a_copy_goes_to_whose_turn_it_is():
    logits = torch.randn(3, 500, generator=seeded(0))
    copies = Copies(torch.full((2, 3), -1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    out = torch.full((3,), -1, dtype=torch.int32)
    assert best(logits, out, copies) is out
    assert out.tolist() == logits.argmax(dim=1).tolist()
    assert copies.token_ids_WO.tolist() == [[-1] * 3, out.tolist()]


def test_columns_may_have_names():
    logits = torch.randn(3, 4, generator=seeded(1))
    names = torch.randint(0, 1000, (3, 4), generator=seeded(2), dtype=torch.int32)
    got = best(logits, names_OV=names)
    assert got.tolist() == names.gather(1, logits.argmax(dim=1)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("rank", [0, 2])
def test_of_a_vocabulary_that_ranks_share(rank):
    ranks = Ranks()
    for launch in (1, 2, 3):
        logits = torch.randint(-3, 4, (5, RANKS * 70), generator=seeded(launch)).float()
        logits[0] = -torch.inf
        parts_R = logits.chunk(RANKS, dim=1)
        words_R = [
            torch.stack([part.amax(1).view(torch.int32), (part.argmax(1) + source * 70).int()], 1).flatten()
            for source, part in enumerate(parts_R)
        ]
        ranks.have_sent(launch, words_R, rank)
        assert best(parts_R[rank], ranks=ranks.peers[rank]).tolist() == logits.argmax(dim=1).tolist()
        ranks.assert_sent(launch, rank, words_R[rank])


def test_no_more_rows_wait_for_each_other_than_run_together():
    with pytest.raises(DeepspanError, match="9 rows between ranks: kernel best"):
        best(torch.zeros(9, 40), ranks=Ranks().peers[0])
