"""``deepspan plan`` accepts every shipped deployment, and refuses what does not divide or does not fit."""

import json

import pytest

from deepspan.models.capacity import GIB
from deepspan.scripts.commands.plan import planned_spec
from deepspan.scripts.runtime import read_run
from tests.cli.conftest import DEMO

DEPLOYMENTS = {"h200_8_fp8": 8, "h800_2x8_fp8": 16, "mi300x_8_fp8": 8, "a100_4x8_bf16": 32, "h20_8_int4": 8}
DEPLOYMENTS |= {"atlas_4x8_bf16": 32, "atlas_2x8_w8a8": 16}


@pytest.mark.parametrize(("name", "ranks"), DEPLOYMENTS.items())
def test_shipped_deployments_fit(deepspan, name, ranks):
    result = deepspan("plan", name, "--json")
    found = json.loads(result.out)
    assert result.code == 0 and found["world_size"] == ranks
    assert found["kv_tokens"] > 32768


@pytest.mark.parametrize(
    ("form", "chosen"),
    [
        ("w8a8-ct", {"torch_triton": "w8a8", "mindspore_ascend": "w8a8", "reference": "fp32"}),
        ("w8a8-mindspore", {"torch_triton": "w8a8", "mindspore_ascend": "w8a8"}),
        (None, {"torch_triton": "fp8", "mindspore_ascend": "bf16"}),
    ],
)
def test_auto_is_the_format_of_the_checkpoint_where_a_backend_has_it(deepspan, tmp_path, form, chosen):
    directory = DEMO if form is None else tmp_path / form
    if form is not None:
        assert deepspan("convert", "quantize", DEMO, directory, "--format", form).code == 0
    for backend, dtype in chosen.items():
        found = json.loads(deepspan("plan", directory, "--set", f"backend={backend}", "--json").out)
        assert found["weights"] == dtype
    for device, dtype in {"cpu": "fp32", "npu": chosen["mindspore_ascend"]}.items():
        assert json.loads(deepspan("plan", directory, "--set", f"device={device}", "--json").out)["weights"] == dtype


def test_int4_groups_are_not_cut(deepspan):
    many = ["--set", "parallel={tp: 128, ep: 128}", "--set", "launch.nodes=16"]
    result = deepspan("plan", "h20_8_int4", *many)
    assert result.code == 2 and "parts of 144 columns of" in result.err and "cut its groups of 128" in result.err
    assert deepspan("plan", "h20_8_int4", *many, "--set", "model={spec: deepseek_v3, weights: random}").code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["parallel.tp=3", "parallel.ep=1", "launch.procs_per_node=3"], "does not divide num_attention_heads"),
        (["parallel.ep=3"], "ep 3 does not divide tp 8 x dp 1"),
        (["parallel.tp=4", "parallel.ep=4"], "1 node of 8 processes for 4 ranks"),
        (["parallel.tp=32", "parallel.ep=1", "launch.nodes=4"], "cut its scale blocks of 128"),
        (["dtype=bf16"], "GiB are missing"),
        (["engine.device_memory_gib=80"], "GiB are missing"),
        (["engine.device_memory=80"], "did you mean engine.device_memory_gib?"),
    ],
)
def test_mutated_deployments_are_refused(deepspan, changes, message):
    options = [part for change in changes for part in ("--set", change)]
    result = deepspan("plan", "h200_8_fp8", *options)
    assert result.code == 2 and message in result.err.splitlines()[-1]


def test_an_fp8_cache_holds_more_tokens(deepspan):
    plain, fp8 = (
        json.loads(deepspan("plan", "h200_8_fp8", "--set", f"engine.kv_dtype={dtype}", "--json").out)
        for dtype in ("bf16", "fp8")
    )
    assert [found["stages"][0]["kv_bytes_per_token"] for found in (plain, fp8)] == [62 * 1152, 62 * 656]
    assert fp8["kv_tokens"] == pytest.approx(plain["kv_tokens"] * 1152 / 656, rel=1e-5)


def test_without_a_memory_size_it_says_what_to_set(deepspan):
    result = deepspan("plan", "demo_reference")
    assert result.code == 0
    assert "1 rank (one process)" in result.out and "rank 0: layers 0 to 3" in result.out
    assert "engine.device_memory_gib" in result.out


def test_a_directory_without_a_config_cannot_be_planned(deepspan, tmp_path):
    result = deepspan("plan", tmp_path)
    assert result.code == 2
    assert result.err == f"error: cannot read: {tmp_path / 'config.json'}: No such file or directory\n"


def test_decode_steps_are_estimated(deepspan):
    result = deepspan("plan", "h800_2x8_fp8", "--decode", "1x4096,64x4096", "--bandwidth", "2000", "--json")
    one, many = json.loads(result.out)["decode"]
    assert one["ms"] == pytest.approx(one["bytes_of_a_rank"][0] / 2e9)
    cache = 31 * 4096 * 61 * 1152  # two replicas share 64 sequences
    assert many["bytes_of_a_rank"][0] > one["bytes_of_a_rank"][0] + cache
    assert deepspan("plan", "h800_2x8_fp8", "--decode", "64").code == 2
    assert "give --decode too" in deepspan("plan", "h800_2x8_fp8", "--bandwidth", "2000").err
    assert "memory were all" not in deepspan("plan", "h800_2x8_fp8", "--decode", "1x10").out


def test_the_cache_that_is_planned_is_what_a_gpu_has_room_for(deepspan, monkeypatch):
    room = pytest.importorskip("deepspan.backends.torch_triton.gpu.room")
    run = read_run("h200_8_fp8")
    found = json.loads(deepspan("plan", "h200_8_fp8", "--json").out)
    [stage] = found["stages"]
    total = round(run.engine.device_memory_gib * GIB)
    loaded = sum(stage["weight_bytes"].values())
    monkeypatch.setattr(room, "memory", lambda device: (total - loaded, total))
    layers = stage["layers"][1] + 2  # and the MTP layer's
    blocks = room.blocks_that_fit(planned_spec(run), run, "bf16", layers, None)
    assert blocks == found["kv_tokens"] // run.engine.block_size
