"""Bytes and operations of a step against figures worked out by hand from the published dimensions."""

import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.costs import Precision, decode_bytes, distinct_experts, prefill_flops
from deepspan.models.holding import Holding
from deepspan.models.sharding import Grid
from tests.specs import make

V3 = load_spec("deepseek_v3")
SLICE = V3.replace({"num_hidden_layers": 5, "first_k_dense_replace": 1})


def read(spec, batch, context, dtype, kv_dtype, experts=None):
    """By one process."""
    [size] = decode_bytes(spec, Grid(), Precision(Holding(dtype), kv_dtype), batch, context, experts)
    return size


def test_a_batch_of_one_uses_the_experts_of_one_token():
    assert distinct_experts(V3, 1) == pytest.approx(8)
    assert distinct_experts(V3, 8) == pytest.approx(57.4, abs=0.1)
    assert distinct_experts(V3, 10_000) == pytest.approx(256)


def test_a_decode_step_of_five_layers_of_v3_in_fp8_reads_4_78_gigabytes():
    """One dense layer of 0.58 GB, four of 0.187 + 9 x 0.0440 GB, a BF16 head of 1.85 GB."""
    assert read(SLICE, 1, 0, "fp8", "bf16") == pytest.approx(4.78e9, rel=0.005)


def test_experts_that_were_counted_take_the_place_of_even_routing():
    even = read(SLICE, 8, 0, "fp8", "bf16")
    assert read(SLICE, 8, 0, "fp8", "bf16", distinct_experts(SLICE, 8)) == even
    one_more = read(SLICE, 8, 0, "fp8", "bf16", distinct_experts(SLICE, 8) + 1) - even
    assert one_more == pytest.approx(4 * 3 * 2048 * 7168, rel=1e-3)


def test_every_sequence_reads_its_own_latents():
    alone = read(SLICE, 1, 0, "bf16", "bf16")
    assert read(SLICE, 1, 1000, "bf16", "bf16") - alone == 5 * 1152 * 1000
    one, two = (read(SLICE, 4, context, "bf16", "fp8") for context in (0, 1000))
    assert two - one == 4 * 5 * 656 * 1000


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 16), ("fp8", 8), ("w8a8", 8), ("int4", 4)])
def test_linear_weights_shrink_with_their_format(dtype, bits):
    linear = (read(V3, 1, 0, dtype, "bf16") - read(V3, 1, 0, "bf16", "bf16")) / 2
    active = 37_552_297_472 - 2 * 129_280 * 7168  # without embedding and head; norms and routers are small
    active -= 61 * 32_768 * 512 * (dtype != "fp8")  # kv_b_proj is in BF16, in FP8 as well
    assert linear == pytest.approx(active * (bits / 16 - 1), rel=0.04)


def test_a_rank_reads_its_part_and_stages_their_layers():
    """Four ranks share experts and heads; two stages of two replicas read one replica's cache each."""
    precision = Precision(Holding("bf16"), "bf16")
    alone = read(SLICE, 8, 1000, "bf16", "bf16", 40)
    [rank] = decode_bytes(SLICE, Grid(tp=4, ep=4), precision, 8, 1000, 40)
    repeated = 5 * (1536 + 576) * 7168 * 2 + 4 * 256 * 7168 * 2 + 8 * 5 * 1152 * 1000  # and norms, biases
    assert rank == pytest.approx((alone - repeated) / 4 + repeated, rel=1e-3)
    stages = decode_bytes(SLICE, Grid(dp=2, ep=2, pp=2), precision, 8, 1000, 40)
    experts, cache = 4 * 40 * 3 * 2048 * 7168 * 2, 8 * 5 * 1152 * 1000
    assert sum(stages) == pytest.approx(alone - experts / 2 - cache / 2, rel=1e-3)
    assert stages[0] > stages[1] / 2 > 0


def test_prefill_of_one_token_multiplies_by_every_weight_of_it_once():
    active = 37_552_297_472 - 129_280 * 7168
    attention = 61 * 128 * (192 + 128)
    assert prefill_flops(V3, 1, 1) == 2 * (active + attention)


def test_attention_grows_with_the_square_of_the_prompt():
    spec = make(num_hidden_layers=1, first_k_dense_replace=1, n_routed_experts=0, num_experts_per_tok=0,
                num_nextn_predict_layers=0)  # fmt: skip
    per_pair = 2 * spec.num_attention_heads * (spec.qk_head_dim + spec.v_head_dim)
    linear = prefill_flops(spec, 1, 2) - prefill_flops(spec, 1, 1) - 2 * per_pair
    assert prefill_flops(spec, 3, 100) == 3 * (prefill_flops(spec, 1, 1) + 99 * linear + (5050 - 1) * per_pair)
