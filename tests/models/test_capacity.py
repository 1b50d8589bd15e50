"""Bytes per rank against figures worked out from the published sizes."""

import pytest

from deepspan.models.capacity import plan_stages
from deepspan.models.catalog import load_spec
from deepspan.models.costs import Precision, cache_bytes
from deepspan.models.errors import InputError
from deepspan.models.holding import Held, Holding
from deepspan.models.params import parameters, total_parameters
from deepspan.models.sharding import Grid
from tests.specs import make

V3 = load_spec("deepseek_v3")
BF16 = Precision(Holding("bf16"), "bf16")


def plan(spec, grid, precision=BF16, **options):
    return list(plan_stages(spec, grid, precision, activations=0, **options))


def test_one_process_holds_every_parameter():
    [stage] = plan(V3, Grid(), mtp=False)
    biases = 58 * 256
    assert sum(stage.weight_bytes.values()) == 2 * total_parameters(V3) + 2 * biases
    assert stage.cache_bytes_per_token == 70_272


def test_cache_rows_of_v3():
    assert cache_bytes(V3, "bf16") == 1152
    assert cache_bytes(V3, "fp8") == 656
    assert cache_bytes(make(), "fp32") == 4 * (18 + 6)


def test_stages_add_up_to_the_model_and_mtp_lies_on_the_last():
    stages = plan(V3, Grid(pp=4))
    [whole] = plan(V3, Grid())
    assert sum(stage.weight_bytes["expert"] for stage in stages) == whole.weight_bytes["expert"]
    assert ["mtp" in stage.weight_bytes for stage in stages] == [False, False, False, True]
    assert sum(stage.cache_bytes_per_token for stage in stages) == whole.cache_bytes_per_token == 62 * 1152


def test_experts_are_split_over_every_rank_of_a_stage_and_attention_over_tp_only():
    [alone], [grid] = plan(V3, Grid()), plan(V3, Grid(tp=4, dp=4, ep=16))
    assert grid.weight_bytes["expert"] * 16 == alone.weight_bytes["expert"]
    assert grid.weight_bytes["head"] * 4 == alone.weight_bytes["head"]
    assert grid.weight_bytes["router"] == alone.weight_bytes["router"]


def test_cache_tokens_are_what_is_left():
    [stage] = plan(V3, Grid(tp=8, ep=8), Precision(Holding("fp8"), "bf16"))
    per_token = stage.cache_bytes_per_token
    assert stage.cache_tokens(stage.fixed_bytes + 10 * per_token + 1) == 10
    assert stage.cache_tokens(stage.fixed_bytes - 1) == 0


def test_figures_of_int4_worked_out_by_hand():
    """A rank of eight of V3 in groups of 128 and of 32: each value half a byte, and its part of a word of four."""
    experts = 59 * 32 * 3 * 2048 * 7168
    attention = 62 * (1536 * 7168 + 576 * 7168 + 3072 * 1536 + 7168 * 2048)
    plain = 62 * 2 * 4096 * 512  # kv_b_proj
    for group, width in ((128, 0.5 + 4 / 128), (32, 0.5 + 4 / 32)):
        [stage] = plan(V3, Grid(tp=8, ep=8), Precision(stored_int4(V3, group), "bf16"))
        assert stage.weight_bytes["expert"] == experts * width
        assert stage.weight_bytes["attention"] == attention * width + plain


def stored_int4(spec, group):
    return Holding("int4", {param.name: Held("int4", group) for param in parameters(spec) if param.quantised})


def test_int4_is_split_between_parts_of_groups_that_a_device_takes():
    plan(V3, Grid(tp=64, ep=64), Precision(stored_int4(V3, 128), "bf16"))
    for group in (128, 32):
        message = f"parts of 144 columns of model.layers.0.mlp.down_proj.weight cut its groups of {group}: parallel"
        with pytest.raises(InputError, match=message):
            plan(V3, Grid(tp=128, ep=128), Precision(stored_int4(V3, group), "bf16"))
    plan(V3, Grid(tp=128, ep=128), Precision(Holding("int4"), "bf16"))  # groups that are made of each part


def test_fp8_is_split_between_scale_blocks_or_into_equal_parts_of_one():
    plan(V3, Grid(tp=16), Precision(Holding("fp8"), "bf16"))
    with pytest.raises(InputError, match="parts of 576 of .* cut its scale blocks of 128"):
        plan(V3, Grid(tp=32), Precision(Holding("fp8"), "bf16"))
    plan(V3, Grid(tp=32))
