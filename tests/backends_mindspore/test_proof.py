"""The full-width network of fused operators type-checks on a CPU, and a wrong shape or type does not."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("mindspore", reason="mindspore is not installed")

# Plain operators of the network; everything else in its graphs has to be one of `proof.FUSED`.
PLAIN = {
    "Add", "AllGather", "AllReduce", "Argmax", "BatchMatMul", "BroadcastTo", "Cast", "Concat", "ExpandDims", "Gather",
    "GreaterEqual", "Less", "LessScalar", "LogicalAnd", "MatMul", "Mul", "Reshape", "Select", "StridedSlice", "Sub",
    "SumExt", "Transpose",
}  # fmt: skip
EVERY_LAYER = {"AddRmsNorm", "RmsNorm", "RotaryPositionEmbedding", "ReshapeAndCache", "Swiglu"}
MIXTURE = {"FusedAddTopKDiv", "GroupedMatmulV4"}
SORTED = {"MoeInitRoutingV2", "InnerMoeTokenUnpermute"}  # on each rank, or
SENT = {"MoeDistributeDispatch", "MoeDistributeCombine"}  # to the ranks of the experts
QUANTISED = {"DynamicQuantExt", "QuantBatchMatmul"}
ATTENTION = {"prefill": "FlashAttentionScore", "decode": "PagedAttention"}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("tp", [1, 16, 32])
@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
def test_every_operator_of_every_graph_is_inferred(tp, dtype):
    check(tp, dtype)


@pytest.mark.parametrize(("tp", "ep", "dtype"), [(16, 16, "bf16"), (16, 4, "w8a8")])
def test_with_experts_split_over_ranks(tp, ep, dtype):
    check(tp, dtype, ep=ep)


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize("tp", [1, 4])
def test_with_data_parallel_attention(tp, dtype):
    """TP 4, DP 4 and EP 16 are the degrees of MindFormers' expert-parallel YAMLs."""
    check(tp, dtype, ep=16, dp=16 // tp)


def test_with_static_activation_scales_in_attention():
    check(16, "w8a8", static=True)


def check(tp, dtype, ep=1, dp=1, static=False):
    degrees = {"--tp": tp, "--ep": ep, "--dp": dp}
    options = [*(str(part) for degree in degrees.items() for part in degree), "--dtype", dtype]
    result = python("-m", "deepspan.backends.mindspore_ascend.proof", *options, *["--static"] * static)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    found = {line["graph"]: set(line["operators"]) for line in lines}
    assert set(found) == {"prefill", "decode", "draft prefill", "draft decode"}
    for name, operators in found.items():
        wanted = EVERY_LAYER | MIXTURE | {ATTENTION[name.split()[-1]]}
        wanted |= (QUANTISED if dtype == "w8a8" else set()) | ({"QuantV2"} if static else set())
        sends, gathers = dp > 1 and "decode" in name, dp > 1 and "prefill" in name
        wanted |= (SENT if sends else SORTED) | ({"ReduceScatter"} if gathers else set())
        assert operators - PLAIN == wanted
        assert ("AllReduce" in operators) == (tp > 1)
        assert ("AllGather" in operators) == (tp > 1 or gathers)


MUTATION = """
from deepspan.backends.mindspore_ascend import proof
import mindspore as ms

class Wrong(proof.Placeholders):
    def _parameter(self, name, shape, dtype, fill):
        if name == {name!r}:
            shape = tuple(size + more for size, more in zip(shape, {more!r}, strict=True))
            dtype = getattr(ms, {dtype!r}) if {dtype!r} else dtype
        return super()._parameter(name, shape, dtype, fill)

proof.Placeholders = Wrong
ms.set_device("CPU")
ms.set_context(mode=ms.GRAPH_MODE)
layers = dict(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
spec = proof.load_spec("deepseek_v3").replace(layers)
for name, cell, inputs in proof.graphs(spec, proof.Grid(**{degrees}), {int8}):
    if name == {graph!r}:
        print("refused", proof.type_check(cell, *inputs).refused)
"""
TP, EP = {"tp": 16}, {"tp": 4, "dp": 4, "ep": 16}
LAYER = "model.layers.1"
ROUTED = f"{LAYER}.feed_forward.routed_experts"


@pytest.mark.parametrize(
    ("name", "more", "dtype", "int8", "message", "degrees"),
    [
        (f"{LAYER}.attention.wo.weight", (0, 64), "", False, "MatMul", TP),
        (f"{LAYER}.attention.l2q_proj.weight", (64, 0), "", False, "[Rr]eshape", TP),
        (f"{LAYER}.attention.lkv2kv_v.weight", (0, 1), "", False, "[Rr]eshape", TP),
        (f"{LAYER}.ffn_norm.weight", (1,), "", False, "AddRmsNorm", TP),
        (f"{ROUTED}.ffn.w2.weight", (0, 16, 0), "", False, "GroupedMatmul", TP),
        (f"{ROUTED}.ffn.w_gate_hidden.weight", (0, 0, 2), "", False, "GroupedMatmul", TP),
        (f"{ROUTED}.router.dense.weight", (0, 1), "", False, "MatMul", TP),
        (f"{LAYER}.attention.wo._layer.weight", (0, 16), "", True, "QuantBatchMatmul", TP),
        (f"{ROUTED}.ffn.w2._layer.weight", (0, 1, 0), "", True, "GroupedMatmul", TP),
        (f"{LAYER}.attention.wo.weight", (0, 0), "float16", False, "MatMul", TP),
        (f"{ROUTED}.ffn.w2.weight", (0, 0, 32), "", False, "Add", EP),
        (f"{ROUTED}.ffn.w2.weight", (0, 16, 0), "", False, "GroupedMatmul", EP),
        (f"{ROUTED}.ffn.w_gate_hidden._layer.weight", (0, 1, 0), "", True, "GroupedMatmul", EP),
    ],
)
def test_a_wrong_weight_fails(name, more, dtype, int8, message, degrees):
    script = MUTATION.format(name=name, more=more, dtype=dtype, degrees=degrees, int8=int8, graph="decode")
    result = python("-c", script)
    assert result.returncode != 0, result.stdout
    assert "Kernel select failed" not in result.stderr
    assert re.search(message, result.stderr), result.stderr[-2000:]


LIMITS = """
from deepspan.backends.mindspore_ascend import soc
from deepspan.backends.mindspore_ascend.ops import ascend
from deepspan.models.catalog import load_spec

spec = load_spec("deepseek_v3")
def check(ranks=16, rows=32, **changes):
    return ascend.can_dispatch(spec.replace(changes), ranks, rows)
assert not check(), "no NPU"
soc.infer_for("ascend910b")
assert check() and check(64, rows=16) and check(rows={most})
assert not check(8) and not check(rows={most} + 1) and not check(hidden_size=7168 + 32) and not check(hidden_size=7152)
assert not check(n_routed_experts=384) and not check(num_experts_per_tok=9)
"""


@pytest.mark.parametrize(("buffer", "most"), [("", 56), ("1024", 256)])
def test_tokens_are_sent_within_the_documented_limits(monkeypatch, buffer, most):
    """Of 16 ranks, a row needs 3.5 MiB of HCCL's buffer, which has 200 unless HCCL_BUFFSIZE says otherwise."""
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    if buffer:
        monkeypatch.setenv("HCCL_BUFFSIZE", buffer)
    result = python("-c", LIMITS.format(most=most))
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("degrees", [TP, EP])
@pytest.mark.parametrize("int8", [False, True])
def test_the_mutation_script_passes_without_a_mutation(degrees, int8):
    script = MUTATION.format(name="", more=(), dtype="", degrees=degrees, int8=int8, graph="decode")
    result = python("-c", script)
    assert result.returncode == 0 and "refused" in result.stdout, result.stderr[-2000:]
