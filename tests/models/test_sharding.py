"""Shards cover every parameter: each element on as many ranks as the rule says, and on no others."""

from collections import Counter

import numpy as np
import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.errors import InputError
from deepspan.models.params import parameters
from deepspan.models.sharding import Grid, check_divides, shards, stage_layers

DEMO = load_spec("demo")
GRIDS = [Grid(), Grid(tp=4), Grid(tp=2, ep=2), Grid(tp=4, ep=2), Grid(dp=4, ep=4), Grid(tp=2, dp=2, ep=4),
         Grid(tp=2, dp=2), Grid(pp=2), Grid(tp=2, pp=3), Grid(tp=2, dp=2, ep=2, pp=4)]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_element_lies_on_as_many_ranks_as_the_rule_says(grid):
    check_divides(DEMO, grid)
    held = {param.name: np.zeros(param.shape, np.int32) for param in parameters(DEMO)}
    for rank in range(grid.world_size):
        for shard in shards(DEMO, grid, rank):
            window = tuple(slice(*part) if part else slice(None) for part in (shard.rows, shard.cols))
            held[shard.param.name][window[: len(shard.param.shape)]] += 1
            assert held[shard.param.name][window[: len(shard.param.shape)]].shape == shard.shape
    for param in parameters(DEMO):
        if param.group == "expert":
            copies = 1
        elif {"heads", "ffn", "vocab"} & set(param.axes):
            copies = grid.dp
        else:
            copies = grid.stage_ranks
        twice = param.group == "embedding" and grid.pp > 1
        assert (held[param.name] == copies * (2 if twice else 1)).all(), param.name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_stages_share_the_layers_evenly_and_in_order(grid):
    stages = [stage_layers(DEMO, grid, stage) for stage in range(grid.pp)]
    assert [layer for stage in stages for layer in stage] == list(range(DEMO.num_hidden_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_positions_number_tensor_ranks_first():
    grid = Grid(tp=2, dp=2, ep=2, pp=2)
    assert [grid.position(rank).tp for rank in range(8)] == [0, 1] * 4
    assert [grid.position(rank).dp for rank in range(8)] == [0, 0, 1, 1] * 2
    assert [grid.position(rank).pp for rank in range(8)] == [0] * 4 + [1] * 4
    assert [grid.position(rank).expert_group for rank in range(4)] == [0, 0, 1, 1]


def test_without_mtp_nothing_of_it_is_held_and_the_embedding_once():
    grid = Grid(pp=2)
    names = Counter(shard.param.name for rank in range(2) for shard in shards(DEMO, grid, rank, mtp=False))
    assert names == Counter(param.name for param in parameters(DEMO, mtp=False))


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("deepseek_v3", Grid(tp=3), "parallel.tp = 3 does not divide num_attention_heads = 128"),
        ("deepseek_v2_lite", Grid(tp=32), "parallel.tp = 32 does not divide num_attention_heads = 16"),
        ("kimi_k2", Grid(dp=256, ep=256), "parallel.ep = 256 does not divide n_routed_experts = 384"),
        ("deepseek_v3", Grid(pp=64), "64 stages for 61 layers"),
        ("moonlight_16b_a3b", Grid(dp=3), "does not divide moe_intermediate_size = 1408"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_the_size(name, grid, message):
    with pytest.raises(InputError, match=message):
        check_divides(load_spec(name), grid)


def test_expert_parallel_must_divide_the_ranks_of_a_stage():
    with pytest.raises(InputError, match="ep 3 does not divide tp 2 x dp 2"):
        Grid(tp=2, dp=2, ep=3)


def test_published_deployments_divide():
    for spec, grid in [
        ("deepseek_v3", Grid(tp=32)),
        ("deepseek_v3", Grid(tp=16)),
        ("deepseek_v3", Grid(tp=4, ep=16, dp=4)),
        ("deepseek_v3", Grid(tp=8, ep=8)),
        ("kimi_k2", Grid(tp=16, ep=16)),
        ("deepseek_v2_lite", Grid(tp=2)),
    ]:
        check_divides(load_spec(spec), grid)
