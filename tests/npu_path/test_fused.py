"""The model of fused operators, each computed as torch-npu documents it, against the one of plain operators.

The sizes that fused attention takes are the family's, whatever the rest of the model is like.
"""

import numpy as np
import pytest
import torch

from deepspan.backends.torch_triton.npu import composite, fused, runner
from tests.backends.opening import BF16, DictWeights, logits_of, median_token_difference, random_tokens, step
from tests.backends.opening import loaded as loaded_on_cpu
from tests.npu_path.documented import RULES, Documented
from tests.npu_path.emulated import VALUES
from tests.npu_path.opening import loaded
from tests.npu_path.proof import define
from tests.npu_path.schemas import table
from tests.specs import V2, make, random_weights

SIZES = {
    "num_attention_heads": 2, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_hidden_layers": 2,
}  # fmt: skip
SPECS = {
    "v3": make(**SIZES, n_routed_experts=16),
    "kimi-k2: one group, half-split rope": make(
        **SIZES, family="kimi_k2", n_group=1, topk_group=1, rope_interleave=False, num_nextn_predict_layers=0
    ),
    "v2-lite: no q_lora, greedy": make(
        **{**SIZES, "q_lora_rank": None}, **V2, topk_method="greedy", n_group=1, topk_group=1
    ),
}
PIECES = [20, 1, 7, 3, 1]  # a prompt, decoding, a chunk at an offset, tokens to verify; blocks of 16
ENGINE = {"block_size": 16}


@pytest.fixture(autouse=True)
def library():
    defined = define(table()[1])
    yield defined
    defined._destroy()


@pytest.fixture
def fused_runner(monkeypatch):
    def opened(spec, values, dtype):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "choose_operators", lambda *_: fused)
            return loaded(spec, values, dtype, **ENGINE)

    return opened


def test_every_rule_has_values():
    assert VALUES.keys() == RULES.keys()


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize("name", SPECS)
def test_the_same_logits(name, dtype, fused_runner):
    spec, values = SPECS[name], random_weights(SPECS[name])
    tokens = random_tokens(spec, sum(PIECES))
    wanted = logits_of(loaded_on_cpu(spec, DictWeights(values), backend_name="reference"), tokens, [len(tokens)])
    with Documented(values=VALUES) as checked:
        got = logits_of(fused_runner(spec, values, dtype), tokens, PIECES)
    assert set(checked.calls) >= set(RULES) - {"npu_quant_matmul", "npu_dynamic_quant", "npu_moe_gating_top_k"}
    assert np.isfinite(got).all()
    assert median_token_difference(got, wanted) <= (BF16 if dtype == "bf16" else 0.1)


def test_a_mixed_step_and_drafts(fused_runner):
    """Prompts, decoding and tokens to verify in one step, against the plain operators in FP32."""
    spec, values = SPECS["v3"], random_weights(SPECS["v3"])
    tokens = [random_tokens(spec, 40, seed) for seed in range(4)]
    first = [(i, 0, tokens[i][:context]) for i, context in enumerate([30, 17, 16])]
    second = [(0, 30, tokens[0][30:31]), (1, 17, tokens[1][17:20]), (2, 16, tokens[2][16:40]), (3, 0, tokens[3][:9])]

    def run(opened):
        step(opened, first)
        return step(opened, second, draft=True)

    wanted = run(loaded(spec, values, "fp32", **ENGINE))
    with Documented(values=VALUES):
        got = run(fused_runner(spec, values, "bf16"))
    assert median_token_difference(got.logits_OV, wanted.logits_OV) <= BF16
    same = got.token_ids_O == wanted.token_ids_O  # a draft follows the token that was sampled
    assert same.mean() > 0.7
    assert median_token_difference(got.draft_logits_OV[same], wanted.draft_logits_OV[same]) <= BF16


def test_experts_elsewhere_add_nothing():
    """Rows of other ranks' experts are not written by the grouped product, and must not reach the sum."""
    rows, experts, kept, width = 5, 3, 2, 8
    x_TD = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids_TK = torch.tensor([[0, 3], [3, 3], [2, 1], [3, 0], [1, 3]], dtype=torch.int32)
    weight_EDF = torch.randn(experts, width, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight_TK = torch.ones(rows, kept)

    def routed(operators):
        rows_PD, places, counts_E, _ = operators.permute(x_TD, ids_TK, experts + 1)
        y_PF = operators.grouped_matmul(rows_PD, weight_EDF, counts_E[:experts])
        y_PF = torch.where(torch.arange(len(y_PF))[:, None] < counts_E[:experts].sum(), y_PF, 0)
        return operators.unpermute(y_PF, places, weight_TK)

    with Documented(values=VALUES):
        got = routed(fused)
    torch.testing.assert_close(got, routed(composite), rtol=2**-7, atol=2**-7)
    assert got[1].abs().max() == 0
