"""Conversions between layouts against an obvious slow path, and back to the same bytes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.models.errors import InputError
from deepspan.models.layouts.mindspore import InferOptions, inference_targets, training_targets
from deepspan.models.layouts.placement import assemble
from tests.convert import encoders
from tests.convert.checkpoints import DEMO, assert_same_tensors, change, convert, files, stored, write_random
from tests.specs import SPECS

LAYOUTS = {
    "infer": ({"layout": "infer"}, inference_targets),
    "infer, fused": (
        {"layout": "infer", "qkv_concat": True, "ffn_concat": True},
        lambda spec: inference_targets(spec, options=InferOptions(qkv_concat=True, ffn_concat=True)),
    ),
    "infer, MTP names": (
        {"layout": "infer", "mtp_names": True},
        lambda spec: inference_targets(spec, options=InferOptions(mtp_names=True)),
    ),
    "train": ({"layout": "train"}, lambda spec: training_targets(spec, grouped=False)),
    "train-grouped": ({"layout": "train-grouped"}, lambda spec: training_targets(spec, grouped=True)),
}
FP8 = [name for name, form in encoders.FORMATS.items() if form.name.startswith("fp8_block")]
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A random checkpoint of each spec."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_random(folder / str(i), spec) for i, (name, spec) in enumerate(SPECS.items())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_mindspore_layouts_and_back(sources, tmp_path, name, layout):
    options, targets = LAYOUTS[layout]
    canonical = stored(sources[name])
    values = {key: tensor.float().numpy() for key, tensor in canonical.items()}
    converted = convert("hf-to-mindspore", sources[name], tmp_path / "ms", **options)
    found = stored(converted)
    wanted = list(targets(SPECS[name]))
    assert found.keys() == {target.name for target in wanted}
    places = json.loads((converted / "param_name_map.json").read_text())
    for target in wanted:
        expected = torch.from_numpy(assemble(target, values)).to(TORCH[target.dtype])
        assert_same_tensors({target.name: found[target.name]}, {target.name: expected})
        assert places[target.name] == target.file
    assert_same_tensors(stored(convert("mindspore-to-hf", converted, tmp_path / "hf")), canonical)


@pytest.mark.parametrize("layout", ["train", "train-grouped"])
@pytest.mark.parametrize("name", ["v3", "v2-lite: no q_lora, greedy", "every second layer MoE, no shared expert"])
def test_training_to_inference_is_what_direct_conversion_gives(sources, tmp_path, name, layout):
    trained = convert("hf-to-mindspore", sources[name], tmp_path / "train", layout=layout)
    served = convert("train-to-infer", trained, tmp_path / "infer")
    direct = convert("hf-to-mindspore", sources[name], tmp_path / "direct", layout="infer")
    assert_same_tensors(stored(served), stored(direct))
    layers = {f"layer_{i}.safetensors" for i in range(SPECS[name].num_hidden_layers + len(SPECS[name].mtp_layers()))}
    assert {path.name for path in served.glob("*.safetensors")} == {"general.safetensors", *layers}
    if SPECS[name].has_router_bias:
        bias = stored(sources[name])["model.layers.2.mlp.gate.e_score_correction_bias"]
        routed = "model.layers.2.feed_forward.routed_experts."
        assert torch.equal(stored(served)[f"{routed}router.e_score_correction_bias"], bias)


@pytest.mark.parametrize("name", ["v3", "v2-lite: no q_lora, greedy", "dense only"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_demo_rank_files_and_back(tmp_path, name, ranks):
    even = replace(SPECS[name], vocab_size=84, intermediate_size=52, moe_intermediate_size=24)
    source = write_random(tmp_path / "source", even)
    if not even.n_routed_experts:
        ranks = 1  # nothing to share
    cut = convert("hf-to-demo", source, tmp_path / "demo", ranks=ranks)
    assert {path.name for path in cut.glob("*.safetensors")} == {
        f"model{i}-mp{ranks}.safetensors" for i in range(ranks)
    }
    assert_same_tensors(stored(convert("demo-to-hf", cut, tmp_path / "hf")), stored(source))


def test_demo_ranks_hold_their_share(tmp_path):
    source = write_random(tmp_path / "source", replace(SPECS["v3"], vocab_size=84))
    cut = convert("hf-to-demo", source, tmp_path / "demo", ranks=2)
    whole = stored(source)
    second = load_file(cut / "model1-mp2.safetensors")
    attention = "model.layers.1.self_attn."
    assert torch.equal(second["embed.weight"], whole["model.embed_tokens.weight"][42:])
    assert torch.equal(second["layers.1.attn.wq_b.weight"], whole[f"{attention}q_b_proj.weight"][32:])
    assert torch.equal(second["layers.1.attn.wo.weight"], whole[f"{attention}o_proj.weight"][:, 28:])
    assert torch.equal(second["layers.1.attn.wkv_a.weight"], whole[f"{attention}kv_a_proj_with_mqa.weight"])
    assert torch.equal(second["layers.1.ffn.gate.bias"], whole["model.layers.1.mlp.gate.e_score_correction_bias"])
    experts = {int(name.split(".")[4]) for name in second if ".ffn.experts." in name}
    assert experts == set(range(6, 12))


@pytest.mark.parametrize("form", FP8)
def test_fp8_is_multiplied_once_and_rounded_once(tmp_path, form):
    tensors, values = encoders.encode_model(encoders.SPEC, encoders.FORMATS[form])
    source = encoders.write(tmp_path / "fp8", tensors, encoders.FORMATS[form].config)
    found = stored(convert("fp8-to-bf16", source, tmp_path / "bf16"))
    expected = {
        name: torch.from_numpy(value).to(torch.float32 if "e_score" in name else torch.bfloat16)
        for name, value in values.items()
    }
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("kind", [*LAYOUTS, "demo"])
def test_straight_from_fp8_is_cast_then_convert(tmp_path, kind):
    plain = convert("fp8-to-bf16", DEMO, tmp_path / "bf16")
    if kind == "demo":
        straight = convert("hf-to-demo", DEMO, tmp_path / "a", ranks=4, dtype="bf16")
        twice = convert("hf-to-demo", plain, tmp_path / "b", ranks=4)
        for rank in range(4):
            file = f"model{rank}-mp4.safetensors"
            assert (straight / file).read_bytes() == (twice / file).read_bytes()
        return
    straight = convert("hf-to-mindspore", DEMO, tmp_path / "a", **LAYOUTS[kind][0])
    twice = convert("hf-to-mindspore", plain, tmp_path / "b", **LAYOUTS[kind][0])
    assert_same_tensors(stored(straight), stored(twice))


def test_fp8_rank_files_merge_into_the_source(tmp_path):
    cut = convert("hf-to-demo", DEMO, tmp_path / "demo", ranks=1)
    merged = convert("demo-to-hf", cut, tmp_path / "hf")
    assert_same_tensors(stored(merged), stored(DEMO))
    config = json.loads((merged / "config.json").read_text())
    assert config["quantization_config"] == json.loads((DEMO / "config.json").read_text())["quantization_config"]


def test_fp8_rank_files_that_blocks_divide(tmp_path):
    """Every cut dimension is a multiple of 128 on each of the two ranks, so codes and multipliers are cut together."""
    spec = replace(
        encoders.SPEC, vocab_size=96, hidden_size=136, intermediate_size=256, moe_intermediate_size=256, q_lora_rank=40,
        num_attention_heads=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    tensors, _ = encoders.encode_model(spec, encoders.FORMATS["fp8"])
    source = encoders.write(tmp_path / "fp8", tensors, encoders.FORMATS["fp8"].config)
    config = encoders.hf_config(spec) | {"quantization_config": encoders.FORMATS["fp8"].config}
    (source / "config.json").write_text(json.dumps(config))
    cut = convert("hf-to-demo", source, tmp_path / "demo", ranks=2)
    assert stored_dtype(cut / "model1-mp2.safetensors", "layers.0.attn.wq_b.weight") == "F8_E4M3"
    assert_same_tensors(stored(convert("demo-to-hf", cut, tmp_path / "hf")), tensors)


def stored_dtype(path: Path, name: str) -> str:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[name]["dtype"]


def test_ranks_that_cut_through_blocks_get_bf16_and_a_note(tmp_path):
    plan = KINDS["hf-to-demo"].plan(DEMO, Options(ranks=4))
    assert "cut through the scale blocks" in plan.notes[0]
    assert all(output.dtype != "F8_E4M3" for shard in plan.shards for output in shard.outputs)
    plan.close()
    with pytest.raises(InputError, match="cut through the scale blocks"):
        KINDS["hf-to-demo"].plan(DEMO, Options(ranks=4, dtype="fp8"))


def test_what_travels_with_the_weights(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "source")
    (source / "modeling_deepseek.py").write_text("raise SystemExit('run')\n")
    (source / "LICENSE-MODEL").write_text("free")
    (source / "training.log").write_text("no")
    out = convert("fp8-to-bf16", source, tmp_path / "out")
    for name in ("modeling_deepseek.py", "LICENSE-MODEL", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "training.log").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert before.pop("quantization_config")
    assert after == before
    for path in out.glob("*.safetensors"):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}
        assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())


@pytest.mark.parametrize("kind", ["fp8-to-bf16", "hf-to-mindspore", "hf-to-demo"])
def test_mtp_layers_stay_unless_dropped(tmp_path, kind):
    options = {"ranks": 1} if kind == "hf-to-demo" else {}
    kept = convert(kind, DEMO, tmp_path / "kept", **options)
    dropped = convert(kind, DEMO, tmp_path / "dropped", drop_mtp=True, **options)
    assert any("layers.4." in name for name in stored(kept))
    assert not any("layers.4." in name for name in stored(dropped))
    assert json.loads((kept / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert json.loads((dropped / "config.json").read_text())["num_nextn_predict_layers"] == 0
    manifest = json.loads((dropped / "conversion-manifest.json").read_text())
    assert len(manifest["dropped"]["drop-mtp"]) == sum("layers.4." in name for name in stored(DEMO))


def test_mtp_layers_can_be_dropped_on_the_way_back(sources, tmp_path):
    trained = convert("hf-to-mindspore", sources["v3"], tmp_path / "train", layout="train")
    back = convert("mindspore-to-hf", trained, tmp_path / "hf", drop_mtp=True)
    whole = stored(sources["v3"])
    assert_same_tensors(stored(back), {name: value for name, value in whole.items() if "layers.3." not in name})


def test_shard_size(tmp_path):
    out = convert("fp8-to-bf16", DEMO, tmp_path / "out", shard_bytes=2_000_000)
    sizes = [path.stat().st_size for path in out.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 2_000_000 + 64_000  # and a header
    assert_same_tensors(stored(out), stored(convert("fp8-to-bf16", DEMO, tmp_path / "same")))


def test_training_layout_refuses_mtp_tables_of_their_own(tmp_path):
    source = write_random(tmp_path / "source", SPECS["v3"])
    change(source, "model.layers.3.shared_head.head.weight", lambda weight: weight[5, 5].fill_(1.5))
    with pytest.raises(InputError, match="shared_head.head.weight differs from lm_head.weight"):
        convert("hf-to-mindspore", source, tmp_path / "out", layout="train")
    assert not (tmp_path / "out").exists()
    convert("hf-to-mindspore", source, tmp_path / "out", layout="infer")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_other_plain_dtypes(tmp_path, dtype, torch_dtype):
    plain = convert("hf-to-mindspore", DEMO, tmp_path / "bf16", layout="train")
    other = convert("hf-to-mindspore", DEMO, tmp_path / "other", layout="train", dtype=dtype)
    expected = {
        name: value.to(torch_dtype) if value.dtype == torch.bfloat16 else value for name, value in stored(plain).items()
    }
    assert_same_tensors(stored(other), expected)


def test_fp16_does_not_overflow_silently(tmp_path):
    source = write_random(tmp_path / "source", SPECS["v3"])
    change(source, "model.norm.weight", lambda weight: weight[3].fill_(70000))
    with pytest.raises(InputError, match="model.norm_out.weight has values above 65504"):
        convert("hf-to-mindspore", source, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("kind", ["fp8-to-bf16", "hf-to-mindspore"])
def test_numpy_alone_gives_the_same_bytes(tmp_path, monkeypatch, kind):
    compiled = convert(kind, DEMO, tmp_path / "a")
    monkeypatch.setattr("deepspan.convert.speed.HAS_KERNELS", False)
    assert files(convert(kind, DEMO, tmp_path / "b")) == files(compiled)


def test_values_of_the_embedded_model(tmp_path):
    """Against torch, on the real thing."""
    tensors = stored(DEMO)
    found = stored(convert("fp8-to-bf16", DEMO, tmp_path / "out"))
    for name, weight in tensors.items():
        if weight.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            wanted = (weight.float() * scale[: weight.shape[0], : weight.shape[1]]).bfloat16()
            assert torch.equal(found[name], wanted), name
    assert np.isfinite(found["model.norm.weight"].float().numpy()).all()
