"""deepspan inspect: models by name, whole checkpoints, and what a damaged one lacks."""

import json

import numpy as np
import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.layouts.deepseek_demo import demo_tensor, rank_file
from deepspan.models.layouts.mindspore import InferOptions, inference_targets, training_targets
from deepspan.models.params import parameters
from tests.cli import shards
from tests.cli.conftest import DEMO
from tests.specs import make

SCALE = "model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv"


def inspect(deepspan, path):
    result = deepspan("inspect", path, "--json")
    return result, json.loads(result.out)


def test_deepseek_v3_is_the_published_one(deepspan):
    result, report = inspect(deepspan, "deepseek_v3")
    assert result.code == 0
    assert report["parameters"] == 671_026_419_200
    assert report["active_parameters"] == 37_552_297_472
    assert report["mtp_parameters"] == 13_463_426_304
    assert report["kv_bytes_per_token"] == 70_272
    assert report["hf_tensors"] == {
        "count": 91_991,
        "bytes": 688_574_839_360,
        "by_dtype": {"BF16": 316, "F32": 45_867, "F8_E4M3": 45_808},
    }


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v2", "kimi_k2", "moonlight_16b_a3b", "deepseek_v3_2"])
def test_every_model_has_a_report(deepspan, name):
    text = deepspan("inspect", name).out
    report = inspect(deepspan, name)[1]
    assert f"{report['parameters']:,}" in text and f"{report['kv_bytes_per_token']:,} bytes a token" in text
    assert f"num_hidden_layers={load_spec(name).num_hidden_layers}" in text


@pytest.mark.parametrize("name", ["llama", "DeepSeek-V4", "glm-5", "nothing"])
def test_other_names_are_refused(deepspan, name):
    result = deepspan("inspect", name)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1


def test_a_path_to_nowhere_is_no_model_s_name(deepspan, tmp_path):
    result = deepspan("inspect", tmp_path / "DeepSeek-V3")
    assert (result.code, result.out) == (2, "")
    assert f"no such directory: {tmp_path / 'DeepSeek-V3'}: " in result.err


def test_the_embedded_checkpoint_is_complete(deepspan):
    result, report = inspect(deepspan, DEMO)
    assert (result.code, result.err) == (0, "")
    assert report["layout"] == "huggingface"
    assert report["tensors"] == report["hf_tensors"]
    assert report["files"] == 3 and report["has_mtp"] is True
    assert report["formats"] == {"bf16": 33, "fp8_block": 232, "f32": 4}
    assert report["missing"] == report["extra"] == report["faults"] == []
    assert report["spec"]["hidden_size"] == 192
    text = deepspan("inspect", DEMO).out
    assert "missing          none" in text and "501 (33 BF16, 236 F32, 232 F8_E4M3), 6,494,788 bytes" in text


def test_a_missing_and_an_extra_tensor_are_named(deepspan, checkpoint):
    shards.remove(checkpoint, "model.layers.2.input_layernorm.weight")
    shards.add(checkpoint, "model.layers.2.attention.wo.weight")
    result, report = inspect(deepspan, checkpoint)
    assert report["missing"] == ["model.layers.2.input_layernorm.weight"]
    assert report["extra"] == ["model.layers.2.attention.wo.weight"]
    assert result.code == 2
    assert result.err.startswith("error: not a complete checkpoint: 1 missing, 1 extra: ")
    assert "model.layers.2.attention.wo.weight" in deepspan("inspect", checkpoint).out


def test_a_weight_without_its_scale_is_a_fault_of_that_weight_alone(deepspan, checkpoint):
    shards.remove(checkpoint, SCALE)
    _, report = inspect(deepspan, checkpoint)
    assert len(report["faults"]) == 1 and SCALE in report["faults"][0]
    assert report["missing"] == report["extra"] == []


def test_a_missing_shard_is_named_with_everything_in_it(deepspan, checkpoint):
    file = checkpoint / "model-00002-of-00003.safetensors"
    gone = shards.read(file)
    file.unlink()
    result, report = inspect(deepspan, checkpoint)
    assert result.code == 2
    assert any("absent: model-00002-of-00003.safetensors" in fault for fault in report["faults"])
    assert set(report["missing"]) == {name for name in gone if not name.endswith("_scale_inv")}
    assert report["extra"] == []
    assert report["files"] == 2


@pytest.mark.parametrize("damage", ["truncated", "pointer"])
def test_an_unreadable_shard_is_a_fault_and_the_others_are_still_told(deepspan, checkpoint, damage):
    file = checkpoint / "model-00001-of-00003.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-100] if damage == "truncated" else b"version https://git-lfs.github.com/spec/v1\noid x\n")
    result, report = inspect(deepspan, checkpoint)
    assert result.code == 2
    faults = [fault for fault in report["faults"] if "model-00001" in fault]
    assert len(faults) >= 1 and ("truncated" if damage == "truncated" else "git-lfs pointer") in faults[0]
    assert report["tensors"]["count"] > 100


def test_a_lost_config_leaves_files_and_dtypes(deepspan, checkpoint):
    (checkpoint / "config.json").unlink()
    result, report = inspect(deepspan, checkpoint)
    assert result.code == 2
    assert report["spec"] is None and report["tensors"]["count"] == 501
    assert report["faults"] == [f"no config.json: {checkpoint}: copy it from the model that the weights belong to"]


def test_a_copy_without_mtp_layers_is_complete(deepspan, checkpoint):
    names = [name for name in json.loads((checkpoint / shards.INDEX).read_text())["weight_map"] if ".layers.4." in name]
    for name in names:
        shards.remove(checkpoint, name)
    result, report = inspect(deepspan, checkpoint)
    assert result.code == 0
    assert report["has_mtp"] is False
    assert "MTP layer        none" in deepspan("inspect", checkpoint).out


SPEC = make(num_hidden_layers=2)
CONFIG = {
    "model_type": "deepseek_v3",
    **{
        key: getattr(SPEC, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
            "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
            "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "n_group",
            "topk_group", "num_nextn_predict_layers",
        )
    },
}  # fmt: skip


def layout_names(layout):
    """{file: names} of a complete checkpoint."""
    if layout == "deepseek_demo":
        files = {rank_file(rank, 2): [] for rank in range(2)}
        for param in parameters(SPEC):
            target = demo_tensor(SPEC, param.name, 2)
            for rank, names in enumerate(files.values()):
                if target.only_rank in (None, rank):
                    names.append(target.name)
        return files
    targets = {
        "mindspore_infer": lambda: inference_targets(SPEC),
        "mindspore_infer, fused": lambda: inference_targets(SPEC, options=InferOptions(True, True, True)),
        "mindspore_infer, no MTP": lambda: inference_targets(SPEC, mtp=False),
        "mindspore_train": lambda: training_targets(SPEC, grouped=False),
        "mindspore_train_grouped": lambda: training_targets(SPEC, grouped=True),
    }[layout]()
    files = {}
    for target in targets:
        files.setdefault(target.file, []).append(target.name)
    return files


@pytest.mark.parametrize(
    "layout",
    [
        "deepseek_demo",
        "mindspore_infer",
        "mindspore_infer, fused",
        "mindspore_infer, no MTP",
        "mindspore_train",
        "mindspore_train_grouped",
    ],
)
def test_other_layouts_are_recognised_and_checked_by_name(deepspan, tmp_path, layout):
    tiny = ("F32", [1], np.zeros(1, "<f4").tobytes())
    files = layout_names(layout)
    for file, names in files.items():
        shards.write(tmp_path / file, dict.fromkeys(names, tiny))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result, report = inspect(deepspan, tmp_path)
    assert (result.code, report["layout"], report["missing"], report["extra"]) == (0, layout.split(",")[0], [], [])
    assert report["has_mtp"] is ("no MTP" not in layout)
    file, names = next((file, names) for file, names in files.items() if len(names) > 3)
    lost = next(name for name in names if "norm" in name)
    shards.write(tmp_path / file, {name: tiny for name in [*names, "stray.weight"] if name != lost})
    result, report = inspect(deepspan, tmp_path)
    assert result.code == 2
    assert report["extra"] == ["stray.weight"]
    assert report["missing"] == ([] if layout == "deepseek_demo" else [lost])  # there the other rank has a copy


@pytest.mark.parametrize("what", ["file", "empty directory"])
def test_what_is_no_checkpoint_is_an_error_without_a_report(deepspan, tmp_path, what):
    path = tmp_path
    if what == "file":
        path = tmp_path / "file"
        path.write_text("x")
    result = deepspan("inspect", path)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
