"""The router against `models.routing.route`: the same experts in the same order, weights within 1e-6 relative.

Tokens and weights are small integers, so that logits are exact in any order of summation and ties are real ties.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import router as kernel
from tests.kernels.device import seeded
from tests.specs import make

V2 = {"family": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
SPECS = {
    "v3": make(n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=8),
    "v3, odd groups": make(n_routed_experts=36, n_group=3, topk_group=2, num_experts_per_tok=5),
    "v3, large groups": make(n_routed_experts=80, n_group=2, topk_group=1, num_experts_per_tok=6),
    "kimi-k2: one group": make(family="kimi_k2", n_routed_experts=24, n_group=1, topk_group=1, num_experts_per_tok=6),
    "v2: group-limited": make(**V2, n_routed_experts=40, n_group=8, topk_group=3, topk_method="group_limited_greedy",
                              routed_scaling_factor=16.0, num_experts_per_tok=6),
    "v2-lite: greedy": make(**V2, n_routed_experts=20, n_group=1, topk_group=1, topk_method="greedy"),
    "v2 normalised": make(**{**V2, "norm_topk_prob": True}, topk_method="greedy", n_group=1, topk_group=1),
}  # fmt: skip


def inputs(spec, tokens: int, hidden: int, dtype: torch.dtype):
    """Integers in a NaN frame; few distinct logits, so many ties."""
    generator = seeded(tokens)
    wide_x = torch.full((tokens + 1, hidden + 9), torch.nan).bfloat16()
    wide_x[:tokens, :hidden] = torch.randint(-1, 2, (tokens, hidden), generator=generator)
    wide_w = torch.full((spec.n_routed_experts + 1, hidden + 7), torch.nan, dtype=dtype)
    wide_w[:-1, :hidden] = torch.randint(-1, 2, (spec.n_routed_experts, hidden), generator=generator) / 8
    bias = torch.randint(-2, 3, (spec.n_routed_experts,), generator=generator).float() / 4
    return wide_x[:tokens, :hidden], wide_w[:-1, :hidden], bias if spec.topk_method == "noaux_tc" else None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens, hidden", [(1, 144), (21, 52), (kernel.LIBRARY_TOKENS + 3, 20)])
def test_chooses_what_the_definition_chooses(name, tokens, hidden):
    spec = SPECS[name]
    x, weight, bias = inputs(spec, tokens, hidden, torch.bfloat16)
    room = kernel.scratch(32, spec.n_routed_experts, x.device)
    got = kernel.choose_experts(x, weight, bias, spec, room, shared=2)
    want = kernel.choose_experts_eager(x, weight, bias, spec, shared=2)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-6, atol=0)
    assert not room.arrived.any()


@pytest.mark.parametrize("tokens", [1, 21, kernel.LIBRARY_TOKENS + 3])
@pytest.mark.parametrize(
    "held", [kernel.Held(8, 16, range(600)), kernel.Held(0, 64, range(7, 14)), kernel.Held(60, 4, range(0))]
)
def test_numbers_of_a_stack(tokens, held):
    spec = SPECS["v3"]
    x, weight, bias = inputs(spec, tokens, 52, torch.bfloat16)
    room = kernel.scratch(tokens, spec.n_routed_experts, x.device)
    got = kernel.choose_experts(x, weight, bias, spec, room, shared=2, held=held)
    want = kernel.choose_experts_eager(x, weight, bias, spec, shared=2, held=held)
    assert torch.equal(got.ids, want.ids)
    assert (got.ids >= 0).all() and (got.ids <= held.routed + 2).all()
    everywhere = kernel.choose_experts(x, weight, bias, spec, room, shared=2)
    assert torch.equal(got.weights, everywhere.weights)
    is_own = (everywhere.ids >= held.first) & (everywhere.ids < held.first + held.routed)
    assert torch.equal(got.ids[is_own], everywhere.ids[is_own] - held.first)
    is_shared_TS = everywhere.ids[:, 8:] - spec.n_routed_experts + held.routed
    own_T = torch.tensor([row in held.tokens for row in range(tokens)])
    assert torch.equal(got.ids[own_T, 8:], is_shared_TS[own_T])
    assert (got.ids[~own_T, 8:] == held.routed + 2).all()


def test_large_tiles_give_the_same():
    spec = SPECS["v3"]
    x, weight, bias = inputs(spec, 21, 300, torch.bfloat16)
    room = kernel.scratch(21, spec.n_routed_experts, x.device)
    want = kernel.choose_experts(x, weight, bias, spec, room, shared=1)
    got = kernel.choose_experts(x, weight, bias, spec, room, shared=1, config=kernel.Config(16, 32, 8, 8))
    assert torch.equal(got.ids, want.ids) and torch.equal(got.weights, want.weights)


def test_fp32_weights_and_a_second_launch_with_the_same_scratch():
    spec = SPECS["v3"]
    x, weight, bias = inputs(spec, 3, 1100, torch.float32)
    room = kernel.scratch(3, spec.n_routed_experts, x.device)
    want = kernel.choose_experts_eager(x, weight, bias, spec)
    for _ in range(2):
        assert torch.equal(kernel.choose_experts(x, weight, bias, spec, room).ids, want.ids)


def test_all_logits_equal():
    """Every choice is a tie: the lowest indices of the lowest groups."""
    spec = SPECS["v3"]
    x, weight = torch.zeros(1, 36).bfloat16(), torch.zeros(64, 36).bfloat16()
    got = kernel.choose_experts(x, weight, None, spec, kernel.scratch(1, 64, x.device))
    assert got.ids.tolist() == [list(range(8))]
