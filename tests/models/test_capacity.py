"""Bytes per rank against figures worked out from the published sizes."""

import pytest

from deepspan.models.capacity import Precision, plan_stages
from deepspan.models.catalog import load_spec
from deepspan.models.costs import cache_bytes
from deepspan.models.errors import InputError
from deepspan.models.params import total_parameters
from deepspan.models.sharding import Grid
from tests.specs import make

V3 = load_spec("deepseek_v3")
BF16 = Precision("bf16", "bf16")


def plan(spec, grid, precision=BF16, **options):
    return list(plan_stages(spec, grid, precision, tokens=1, outputs=1, **options))


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
    [stage] = plan(V3, Grid(tp=8, ep=8), Precision("fp8", "bf16"))
    per_token = stage.cache_bytes_per_token
    assert stage.cache_tokens(stage.fixed_bytes + 10 * per_token + 1) == 10
    assert stage.cache_tokens(stage.fixed_bytes - 1) == 0


def test_fp8_is_split_between_scale_blocks_or_into_equal_parts_of_one():
    plan(V3, Grid(tp=16), Precision("fp8", "bf16"))
    with pytest.raises(InputError, match="parts of 576 of .* cut its scale blocks of 128"):
        plan(V3, Grid(tp=32), Precision("fp8", "bf16"))
    plan(V3, Grid(tp=32))
