"""Routing against slow loops written from the formulas, token by token."""

import math

import numpy as np
import pytest

from deepspan.models.routing import route
from deepspan.models.spec import ModelSpec

BASE = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": None,
    "n_shared_experts": 0, "moe_intermediate_size": 8, "first_k_dense_replace": 0,
}  # fmt: skip
V3 = {"family": "deepseek_v3", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
V2 = {"family": "deepseek_v2", "scoring_func": "softmax"}


def spec(**fields) -> ModelSpec:
    return ModelSpec(**{**BASE, "n_routed_experts": 12, "num_experts_per_tok": 3, **fields})


def slow_route(s: ModelSpec, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    if s.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choice = [a + b for a, b in zip(scores, bias, strict=True)] if bias else list(scores)
    if s.topk_method in ("noaux_tc", "group_limited_greedy") and s.n_group > 1:
        size = s.n_routed_experts // s.n_group
        best = 2 if s.topk_method == "noaux_tc" else 1
        value = {g: sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(s.n_group)}
        kept = sorted(value, key=value.get)[-s.topk_group :]
        mask = -math.inf if s.topk_method == "noaux_tc" else 0.0
        choice = [c if e // size in kept else mask for e, c in enumerate(choice)]
    chosen = sorted(range(s.n_routed_experts), key=choice.__getitem__)[-s.num_experts_per_tok :]
    weights = {e: scores[e] for e in chosen}
    if s.norm_topk_prob:
        total = sum(weights.values())
        weights = {e: w / total for e, w in weights.items()}
        if s.family == "deepseek_v2":
            return weights
    return {e: w * s.routed_scaling_factor for e, w in weights.items()}


CASES = {
    "v3 groups": spec(**V3, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "kimi one group": spec(**V3, routed_scaling_factor=2.827),
    "v2-lite greedy": spec(**V2, topk_method="greedy", norm_topk_prob=False),
    "v2 groups": spec(**V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, norm_topk_prob=False,
                      routed_scaling_factor=16.0),
    "v2 normalised": spec(**V2, topk_method="greedy", norm_topk_prob=True, routed_scaling_factor=16.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_route_equals_the_formulas(name):
    s, rng = CASES[name], np.random.default_rng(3)
    logits = rng.normal(0, 2, (200, 12)).astype(np.float32)
    # Biases far below zero would let a masked expert win if the mask were 0.
    bias = rng.normal(-2, 1, 12).astype(np.float32) if s.has_router_bias else None
    index, weights = route(s, logits, bias)
    for t in range(len(logits)):
        wanted = slow_route(s, logits[t].tolist(), None if bias is None else bias.tolist())
        assert dict(zip(index[t].tolist(), weights[t].tolist(), strict=True)) == pytest.approx(wanted, rel=1e-5)


def test_bias_steers_the_choice_and_not_the_weights():
    s = spec(**V3, norm_topk_prob=False, routed_scaling_factor=1.0)
    logits = np.zeros((1, 12), np.float32)
    bias = np.zeros(12, np.float32)
    bias[[2, 5, 11]] = 1
    index, weights = route(s, logits, bias)
    assert set(index[0]) == {2, 5, 11}
    assert weights.tolist() == [[0.5, 0.5, 0.5]]


def test_extreme_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        _, weights = route(spec(**V3), np.full((1, 12), -500, np.float32), np.zeros(12, np.float32))
    assert np.isfinite(weights).all()
