"""How linear weights lie on a device: which format, how many bytes, and where parts may be cut."""

import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.errors import InputError
from deepspan.models.holding import Held, Holding, check_groups, device_group, held_as, shard_bytes, stored_dtype
from deepspan.models.params import Param, parameters
from deepspan.models.sharding import Shard

LINEAR = Param("o_proj.weight", (264, 640), ("hidden", "heads"), "attention", quantised=True)


def test_stored_formats_in_words_of_a_run():
    formats = {"f16": "bf16", "fp8_block_fnuz": "fp8", "int8_block": "w8a8", "ascend_static": "w8a8", "awq": "int4"}
    assert {name: held_as(name, None).dtype for name in formats} == formats
    assert held_as("ct_int4", 32) == Held("int4", 32)


def test_low_bit_runs_hold_weights_as_stored_if_any_is_in_their_format():
    stored = {"a": Held("int4", 64), "b": Held("fp8"), "c": Held("bf16")}
    assert [Holding("int4", stored).of(name) for name in "abc"] == [*stored.values()]
    for dtype in ("w8a8", "fp8", "bf16"):
        assert {Holding(dtype, stored).of(name) for name in "abc"} == {Held(dtype)}


def test_the_format_of_a_checkpoint_is_that_of_most_values():
    spec = load_spec("deepseek_v3")
    names = [param.name for param in parameters(spec) if param.quantised]
    experts = {name: Held("int4", 32) for name in names if ".experts." in name}
    assert stored_dtype(spec, {name: Held("fp8") for name in names} | experts) == "int4"
    assert stored_dtype(spec, dict.fromkeys(names, Held("bf16"))) == "bf16"
    assert [stored_dtype(load_spec(name), {}) for name in ("deepseek_v3", "deepseek_v2")] == ["fp8", "bf16"]


@pytest.mark.parametrize(
    ("held", "size"),
    [
        (Held("fp32"), 4 * 264 * 640),
        (Held("bf16"), 2 * 264 * 640),
        (Held("fp8"), 264 * 640 + 4 * 3 * 5),
        (Held("w8a8"), 264 * 640 + 4 * 264),
        (Held("int4"), 264 * 5 * (64 + 4)),
        (Held("int4", 32), 264 * 20 * (16 + 4)),
        (Held("int4", 640), 264 * 5 * (64 + 4)),
    ],
)
def test_bytes_with_scales(held, size):
    assert shard_bytes(Shard(LINEAR), Holding(held.dtype, {LINEAR.name: held})) == size


def test_bytes_of_a_part_that_cuts_stored_groups_into_smaller_ones():
    holding = Holding("int4", {LINEAR.name: Held("int4", 128)})
    part = Shard(LINEAR, cols=(320, 640))  # two blocks and a half
    assert shard_bytes(part, holding) == 264 * 3 * (64 + 2 * 4)


def test_kv_b_proj_stays_plain():
    param = Param("kv_b_proj.weight", (64, 32), ("heads", "kv_lora"), "attention", quantised=True)
    assert shard_bytes(Shard(param), Holding("int4")) == 2 * 64 * 32


@pytest.mark.parametrize(
    ("size", "first", "columns", "group"),
    [
        (128, 0, 640, 128),
        (128, 320, 320, 64),
        (128, 96, 96, 32),
        (128, 16, 16, 128),
        (32, 64, 640, 32),
        (640, 0, 9, 128),
    ],
)
def test_groups_on_a_device(size, first, columns, group):
    assert device_group("o_proj.weight", size, first, columns) == group


def test_what_no_group_holds_is_refused():
    with pytest.raises(InputError, match="parts of 40 columns of o_proj.weight cut its groups of 128: parallel"):
        device_group("o_proj.weight", 128, 120, 40)
    with pytest.raises(InputError, match="groups of 48 columns: o_proj.weight: use a checkpoint"):
        device_group("o_proj.weight", 48, 0, 640)


def test_every_rank_refuses_what_one_would():
    """The first part of 80 columns begins with a group, and the second one does not."""
    for cols in ((0, 80), (80, 160)):
        with pytest.raises(InputError, match="parts of 80 columns"):
            check_groups([Shard(LINEAR, cols=cols)], Holding("int4", {LINEAR.name: Held("int4", 64)}))
    check_groups([Shard(LINEAR, cols=(0, 80))], Holding("int4"))
    check_groups([Shard(LINEAR, cols=(0, 80))], Holding("int4", {LINEAR.name: Held("bf16")}))
