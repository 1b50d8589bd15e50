"""The fused norm against its eager twin: of one rank alone, and of one beside peers whose branches have come already.

Tolerance: none, except where a mean over a row is summed in another order (1 BF16 ulp of the norm).
"""

from functools import reduce

import numpy as np
import pytest
import torch

from deepspan.backends.torch_triton.kernels import norm, quant
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded
from tests.kernels.ranks import RANKS, Ranks, TwoSteps, parts_of, total
from tests.kernels.rows import bits, poisoned


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tokens, channels", [(1, 7168), (3, 36), (65, 1100)])
def test_add_norm_quantise_equals_its_twin(tokens, channels, parts, residual, form):
    shape = (tokens, channels) if parts is None else (tokens, parts, channels)
    generator = seeded(3)
    branch = torch.randn(shape, generator=generator).to(torch.float32 if parts == 3 else torch.bfloat16)
    before = torch.randn(tokens, channels, generator=generator).bfloat16() if residual else None
    weight = torch.rand(channels, generator=generator) + 0.5
    got = norm.add_norm_quantise(
        poisoned(branch), poisoned(before) if residual else None, weight, 1e-6, plain=True, quantise=form
    )
    twin = norm.add_norm_quantise_eager(branch, before, weight, 1e-6, plain=True, quantise=form)
    assert (got.residual is None) == (twin.residual is None)
    if twin.residual is not None:
        ulps = (got.residual.view(torch.int16).int() - twin.residual.view(torch.int16).int()).abs()
        assert ulps.max() <= (1 if parts == 3 else 0)
    torch.testing.assert_close(got.plain, twin.plain, rtol=2**-7, atol=0 if parts != 3 else 1e-2)
    own = quant.quantise_eager(got.plain) if form == "fp8" else quant.quantise_rows_eager(got.plain)
    np.testing.assert_array_equal(bits(got.quantised.codes), bits(own.codes))
    np.testing.assert_array_equal(got.quantised.scales.numpy(force=True), own.scales.numpy(force=True))


def test_partial_outputs_are_left_out():
    x, weight = torch.randn(2, 256).bfloat16(), torch.ones(256)
    assert norm.add_norm_quantise(x, None, weight, 1e-6, plain=False)[:2] == (None, None)
    assert norm.add_norm_quantise(x, None, weight, 1e-6, plain=True, quantise=None).quantised is None


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("tokens, channels, parts", [(1, 7168, 9), (3, 36, None), (5, 1100, 1)])
def test_the_sum_of_ranks_is_normed(tokens, channels, parts, rank):
    """Each rank's parts are added and rounded; their sums, from the first rank to the last, are rounded again."""
    ranks = Ranks()
    shape = (tokens, channels) if parts is None else (tokens, parts, channels)
    weight = torch.rand(channels, generator=seeded(4)) + 0.5
    for launch in (1, 2, 3):
        branch_R = parts_of(shape, launch, torch.float32)
        own_R = [branch if parts is None else reduce(torch.add, branch.unbind(1)) for branch in branch_R]
        residual = torch.randn(tokens, channels, generator=seeded(launch)).bfloat16() if launch != 2 else None
        ranks.have_sent(launch, [pairs(own) for own in own_R], rank, own=channels > 1024)
        got = norm.add_norm_quantise(
            poisoned(branch_R[rank]), residual, weight, 1e-6, plain=True, ranks=ranks.peers[rank]
        )  # fmt: skip
        ranks.assert_sent(launch, rank, pairs(own_R[rank]))
        sum_TK = total([own.bfloat16() for own in own_R])
        twin = norm.add_norm_quantise_eager(sum_TK, residual, weight, 1e-6, plain=True)
        assert torch.equal(got.residual, sum_TK if residual is None else twin.residual)
        torch.testing.assert_close(got.plain, twin.plain, rtol=2**-7, atol=0)
        own = quant.quantise_eager(got.plain)
        np.testing.assert_array_equal(bits(got.quantised.codes), bits(own.codes))


def test_one_rank_or_several_have_the_same_bits():
    ranks = Ranks()
    parts_R = parts_of((2, 7168), 5)
    residual, weight = torch.randn(2, 7168).bfloat16(), torch.rand(7168)
    ranks.have_sent(1, [pairs(part) for part in parts_R], 2, own=True)
    got = norm.add_norm_quantise(parts_R[2], residual, weight, 1e-6, True, "int8", ranks=ranks.peers[2])
    one = norm.add_norm_quantise(total(parts_R), residual, weight, 1e-6, True, "int8")
    assert torch.equal(got.residual, one.residual)
    assert torch.equal(got.plain, one.plain)
    assert torch.equal(got.quantised.codes, one.quantised.codes)
    assert torch.equal(got.quantised.scales, one.quantised.scales)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("tokens, channels, parts", [(9, 36, None), (5, 2200, 9)])
def test_the_sum_of_ranks_in_two_steps(tokens, channels, parts, rank):
    """A row's branches go to its owner, and from there their sum."""
    ranks = Ranks()
    shape = (tokens, channels) if parts is None else (tokens, parts, channels)
    weight = torch.rand(channels, generator=seeded(4)) + 0.5
    owner_T1 = torch.arange(tokens)[:, None] % RANKS
    for launch in (1, 2, 3):
        branch_R = parts_of(shape, launch, torch.float32)
        own_R = [branch if parts is None else reduce(torch.add, branch.unbind(1)) for branch in branch_R]
        sum_TK = total([own.bfloat16() for own in own_R])
        poison_TW = torch.full((tokens, channels // 2), 0x7FC07FC0, dtype=torch.int32)
        sent_RTW = [
            torch.where(owner_T1 == source, rows_of(sum_TK), torch.where(owner_T1 == rank, rows_of(own), poison_TW))
            for source, own in enumerate(own_R)
        ]
        ranks.have_sent(launch, [words.flatten() for words in sent_RTW], rank, own=channels > 1024)
        peers = TwoSteps(**vars(ranks.peers[rank]))
        got = norm.add_norm_quantise(poisoned(branch_R[rank]), None, weight, 1e-6, plain=True, ranks=peers)
        assert torch.equal(got.residual, sum_TK)
        twin = norm.add_norm_quantise_eager(sum_TK, None, weight, 1e-6, plain=True)
        torch.testing.assert_close(got.plain, twin.plain, rtol=2**-7, atol=0)
        for receiver in range(RANKS):
            room = ranks.rooms[receiver, launch % 2, rank, : sum_TK.numel() // 2].view(tokens, -1, 2)
            is_own, is_theirs = owner_T1[:, 0] == rank, owner_T1[:, 0] == receiver
            assert torch.equal(room[is_own, :, 0], rows_of(sum_TK)[is_own])
            assert (room[is_own, :, 1] == launch).all()
            if receiver != rank:
                assert torch.equal(room[is_theirs, :, 0], rows_of(own_R[rank])[is_theirs])
                assert ((room[:, :, 1] == launch).all(1) == (is_own | is_theirs)).all()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Words of rows."""
    return pairs(x).view(len(x), -1)


def pairs(x: torch.Tensor) -> torch.Tensor:
    """What travels: int32 words of two BF16 numbers."""
    return x.bfloat16().contiguous().view(torch.int32).flatten()


def test_ranks_send_no_more_than_has_room():
    weight, peers = torch.ones(7168), Ranks().peers[0]
    assert norm.takes(torch.empty(146, 7168, device="meta"), peers)
    with pytest.raises(DeepspanError, match="147 rows of 7168 channels between ranks: kernel add_norm_quantise"):
        norm.add_norm_quantise(torch.zeros(147, 7168), None, weight, 1e-6, ranks=peers)
    with pytest.raises(DeepspanError, match="1 rows of 33 channels between ranks"):
        norm.add_norm_quantise(torch.zeros(1, 33), None, weight[:33], 1e-6, ranks=peers)
