"""Calls of torch-npu's fused operators at full width: checked against schemas and documentation, without an NPU."""

import re

import pytest
import torch

from deepspan.backends.torch_triton.npu import fused
from deepspan.models.sharding import Grid
from tests.npu_path.documented import RULES, Documented
from tests.npu_path.proof import GRIDS, STEPS, Shapes, define, forward, model_of, prove, slice_of
from tests.npu_path.schemas import called, table

V3 = slice_of("deepseek_v3")
ATTENTION = "npu_fused_infer_attention_score_v2"


@pytest.fixture(scope="module", autouse=True)
def library():
    """The operators as the table has them, for as long as this module's tests run."""
    defined = define(table()[1])
    yield defined
    defined._destroy()


def test_the_table_and_the_rules_have_what_the_backend_calls():
    version, schemas = table()
    assert re.fullmatch(r"2\.\d+\.\d+", version)
    assert sorted(schemas) == sorted(RULES) == called()


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize("grid", GRIDS)
def test_v3(grid, dtype):
    counts = prove(V3, GRIDS[grid], dtype)
    assert {step: calls[ATTENTION] for step, calls in counts.items()} == {
        "prompts": 6, "decode": 3, "verify": 3, "mixture": 9,  # two calls for three prompts, one for decoding; 3 layers
    }  # fmt: skip
    for calls in counts.values():
        assert (calls["npu_quant_matmul"], calls["npu_dynamic_quant"]) == ((15, 17) if dtype == "w8a8" else (0, 0))
        assert calls["npu_moe_gating_top_k"] == calls["npu_moe_init_routing_v2"] == 2
        assert calls["npu_grouped_matmul"] == 4


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "kimi_k2", "moonlight_16b_a3b"])
def test_the_rest_of_the_family(name):
    for dtype in ("bf16", "w8a8"):
        prove(slice_of(name), Grid(), dtype)


class _Mutated(Shapes):
    """One parameter has a row or a column too many or too few."""

    name, rows, columns = "", 0, 0

    def read(self, name, dtype=None):
        return self._cut(name, super().read(name, dtype))

    def codes(self, name):
        codes, scales = super().codes(name)
        return self._cut(name, codes), scales

    def _cut(self, name, values):
        if name != self.name:
            return values
        shape = values.shape[0] + self.rows, *(size + self.columns for size in values.shape[1:])
        return values.new_empty(shape)


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("self_attn.q_a_proj.weight", 1, 0),
        ("self_attn.q_b_proj.weight", 0, 1),
        ("self_attn.q_a_layernorm.weight", 1, 0),
        ("self_attn.kv_a_layernorm.weight", 1, 0),
        ("self_attn.kv_b_proj.weight", 128, 0),
        ("self_attn.kv_b_proj.weight", 0, 1),
        ("self_attn.o_proj.weight", 0, 1),
        ("self_attn.o_proj.weight", 1, 0),
        ("input_layernorm.weight", 1, 0),
        ("mlp.gate.weight", 1, 0),
        ("mlp.gate.e_score_correction_bias", 1, 0),
        ("mlp.shared_experts.down_proj.weight", 0, 1),
    ],
)
def test_a_weight_that_does_not_fit_fails(name, rows, columns, dtype):
    class Mutated(_Mutated):
        pass

    Mutated.name, Mutated.rows, Mutated.columns = f"model.layers.1.{name}", rows, columns
    with pytest.raises((AssertionError, RuntimeError)), Documented(), torch.inference_mode():
        forward(model_of(V3, Grid(tp=16), dtype, Mutated), V3, STEPS["mixture"])


def test_an_argument_that_is_not_in_the_schema_fails(monkeypatch):
    monkeypatch.setattr(fused, "_NO_MASK", "none")
    with pytest.raises(RuntimeError, match="sparse_mode"):
        prove(V3, Grid(), "bf16")


@pytest.mark.parametrize(("name", "value"), [("_RIGHT_DOWN_CAUSAL", 2), ("_CAUSAL_MASK", 1024), ("_COUNTS", 0)])
def test_an_argument_that_documentation_forbids_fails(monkeypatch, name, value):
    monkeypatch.setattr(fused, name, value)
    fused._causal_mask.cache_clear()
    with pytest.raises(AssertionError):
        prove(V3, Grid(), "bf16")
    fused._causal_mask.cache_clear()
