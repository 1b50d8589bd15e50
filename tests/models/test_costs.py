"""Bytes and operations of a step against figures worked out by hand from the published dimensions."""

import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.costs import decode_bytes, distinct_experts, prefill_flops
from tests.specs import make

V3 = load_spec("deepseek_v3")
SLICE = V3.replace({"num_hidden_layers": 5, "first_k_dense_replace": 1})


def test_a_batch_of_one_uses_the_experts_of_one_token():
    assert distinct_experts(V3, 1) == pytest.approx(8)
    assert distinct_experts(V3, 8) == pytest.approx(57.4, abs=0.1)
    assert distinct_experts(V3, 10_000) == pytest.approx(256)


def test_a_decode_step_of_five_layers_of_v3_in_fp8_reads_4_78_gigabytes():
    """One dense layer of 0.58 GB, four of 0.187 + 9 x 0.0440 GB, a BF16 head of 1.85 GB."""
    assert decode_bytes(SLICE, 1, 0, "fp8", "bf16") == pytest.approx(4.78e9, rel=0.005)


def test_experts_that_were_counted_take_the_place_of_even_routing():
    even = decode_bytes(SLICE, 8, 0, "fp8", "bf16")
    assert decode_bytes(SLICE, 8, 0, "fp8", "bf16", distinct_experts(SLICE, 8)) == even
    one_more = decode_bytes(SLICE, 8, 0, "fp8", "bf16", distinct_experts(SLICE, 8) + 1) - even
    assert one_more == pytest.approx(4 * 3 * 2048 * 7168, rel=1e-3)


def test_every_sequence_reads_its_own_latents():
    alone = decode_bytes(SLICE, 1, 0, "bf16", "bf16")
    assert decode_bytes(SLICE, 1, 1000, "bf16", "bf16") - alone == 5 * 1152 * 1000
    one, two = (decode_bytes(SLICE, 4, context, "bf16", "fp8") for context in (0, 1000))
    assert two - one == 4 * 5 * 656 * 1000


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 16), ("fp8", 8), ("w8a8", 8), ("int4", 4)])
def test_linear_weights_shrink_with_their_format(dtype, bits):
    linear = (decode_bytes(V3, 1, 0, dtype, "bf16") - decode_bytes(V3, 1, 0, "bf16", "bf16")) / 2
    active = 37_552_297_472 - 2 * 129_280 * 7168  # without embedding and head; norms and routers are small
    assert linear == pytest.approx(active * (bits / 16 - 1), rel=0.04)


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
