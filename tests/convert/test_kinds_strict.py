"""What conversions refuse, and the exceptions that a user can ask for by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.models.errors import InputError
from tests.cli import shards
from tests.convert import encoders
from tests.convert.checkpoints import DEMO, assert_same_tensors, change, convert, stored, write_random
from tests.specs import SPECS

Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture
def demo(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


@pytest.fixture
def trained(tmp_path) -> Path:
    return convert("hf-to-mindspore", write_random(tmp_path / "source", SPECS["v3"]), tmp_path / "ms", layout="train")


def refused(kind: str, source: Path, match: str, **options: object) -> None:
    """Refused while planning, from headers alone."""
    with pytest.raises(InputError, match=match):
        KINDS[kind].plan(source, Options(**options))


@pytest.mark.parametrize("kind", ["fp8-to-bf16", "hf-to-mindspore", "hf-to-demo"])
def test_fp8_weight_without_multipliers(demo, kind):
    shards.remove(demo, f"{Q_A}_scale_inv")
    refused(kind, demo, f"{Q_A} is F8_E4M3 and has no .*scale", **({"ranks": 1} if kind == "hf-to-demo" else {}))


def test_fp8_weight_without_multipliers_on_request(demo, tmp_path):
    codes = stored(demo)[Q_A].clone()  # the file that it is mapped from is written anew
    shards.remove(demo, f"{Q_A}_scale_inv")
    out = convert("fp8-to-bf16", demo, tmp_path / "out", allow=(f"unscaled={Q_A}",))
    assert torch.equal(stored(out)[Q_A], codes.float().bfloat16())
    assert json.loads((out / "conversion-manifest.json").read_text())["options"] == {"allow": [f"unscaled={Q_A}"]}


def test_tensor_of_no_parameter(demo, tmp_path):
    shards.add(demo, "model.layers.0.self_attn.secret")
    refused("fp8-to-bf16", demo, "no parameter for: model.layers.0.self_attn.secret")
    out = convert("fp8-to-bf16", demo, tmp_path / "out", allow=("drop=*.secret",))
    dropped = json.loads((out / "conversion-manifest.json").read_text())["dropped"]
    assert dropped == {"drop": ["model.layers.0.self_attn.secret"]}
    assert_same_tensors(stored(out), stored(convert("fp8-to-bf16", DEMO, tmp_path / "clean")))


def test_rope_buffers_are_dropped_by_their_rule(demo, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shards.add(demo, name)
    out = convert("fp8-to-bf16", demo, tmp_path / "out")
    assert json.loads((out / "conversion-manifest.json").read_text())["dropped"] == {"rope-buffer": [name]}


def test_wider_tensors_are_not_narrowed_silently(tmp_path):
    source = write_random(tmp_path / "source", SPECS["v3"])
    tensors = stored(source)
    tensors[Q_A] = tensors[Q_A].float() * 1.001
    config = (source / "config.json").read_text()
    encoders.write(source, tensors)
    (source / "config.json").write_text(config)
    refused("hf-to-mindspore", source, f"{Q_A} is F32, and BF16 in this model")
    out = convert("hf-to-mindspore", source, tmp_path / "out", allow=(f"round={Q_A}",))
    assert torch.equal(stored(out)["model.layers.0.attention.q2l_proj.weight"], tensors[Q_A].bfloat16())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("drop", "'drop' is not RULE=NAME"),
        ("drop=", "is not RULE=NAME"),
        ("dorp=x", "did you mean drop"),
        ("drop=model.layers.99.*", "no tensor needs drop=model.layers.99"),
        (f"unscaled={Q_A}", "no tensor needs unscaled="),
    ],
)
def test_allowances_that_make_no_sense(given, message):
    refused("fp8-to-bf16", DEMO, message, allow=(given,))


def test_other_low_bit_formats_are_not_cast(tmp_path):
    form = encoders.FORMATS["int8 channels, F32"]
    source = encoders.write(tmp_path / "int8", encoders.encode_model(encoders.SPEC, form)[0], form.config)
    refused("fp8-to-bf16", source, "is stored as int8_channel, not FP8: .*: convert it with dequantize")
    refused("hf-to-demo", source, "is stored as int8_channel", ranks=1)


def test_a_plain_checkpoint_is_copied_with_a_note(tmp_path):
    source = write_random(tmp_path / "source", SPECS["v2-lite: no q_lora, greedy"])
    plan = KINDS["fp8-to-bf16"].plan(source, Options())
    plan.close()
    assert plan.notes == ("no weight is FP8: every tensor is copied as it is",)
    assert_same_tensors(stored(convert("fp8-to-bf16", source, tmp_path / "out")), stored(source))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (None, "give --mp N"),
        (5, "5 ranks cannot share 16 experts"),
        (0, "0 ranks"),
        (16, "16 ranks cannot share dimension 0 of model.layers.0.mlp.gate_proj.weight, which is 520"),
    ],
)
def test_rank_counts_that_do_not_divide(ranks, message):
    refused("hf-to-demo", DEMO, message, ranks=ranks)


def test_unknown_layouts_and_dtypes():
    refused("hf-to-mindspore", DEMO, "did you mean train", layout="trian")
    refused("hf-to-mindspore", DEMO, "unknown dtype 'int8'", dtype="int8")
    refused("hf-to-mindspore", DEMO, "only the inference layout has variants", layout="train", qkv_concat=True)
    refused("hf-to-demo", DEMO, "unknown dtype", dtype="fp32", ranks=1)


def test_mindspore_directories_that_are_not_whole(trained):
    (shard,) = (path for path in trained.glob("*.safetensors") if "00002" in path.name)
    tensors = shards.read(shard)
    name = "model.layers.1.feed_forward.routed_experts.ffn.w2.weight"
    shards.write(shard, {key: value for key, value in tensors.items() if key != name})
    refused("mindspore-to-hf", trained, f"the map disagrees with the files on {name}")
    places = json.loads((trained / "param_name_map.json").read_text())
    del places[name]
    (trained / "param_name_map.json").write_text(json.dumps({"weight_map": places}))
    refused("mindspore-to-hf", trained, f"missing: {name}")
    shards.write(shard, {**tensors, name: ("BF16", [1], bytes(2))})
    places[name] = shard.name
    (trained / "param_name_map.json").write_text(json.dumps(places))
    refused("train-to-infer", trained, f"{name} is \\[1\\], not")
    (trained / "param_name_map.json").unlink()
    refused("mindspore-to-hf", trained, "no param_name_map.json")


def test_optimizer_states_are_dropped_on_request(trained, tmp_path):
    plain = stored(convert("mindspore-to-hf", trained, tmp_path / "plain"))
    (shard,) = (path for path in trained.glob("*.safetensors") if "00002" in path.name)
    shards.write(shard, {**shards.read(shard), "adam_m.model.layers.1.attention_norm.weight": ("F32", [1], bytes(4))})
    places = json.loads((trained / "param_name_map.json").read_text())
    places["adam_m.model.layers.1.attention_norm.weight"] = shard.name
    (trained / "param_name_map.json").write_text(json.dumps(places))
    refused("mindspore-to-hf", trained, "no parameter for: adam_m.model.layers.1")
    out = convert("mindspore-to-hf", trained, tmp_path / "out", allow=("drop=adam_*",))
    assert_same_tensors(stored(out), plain)


def test_directories_of_another_layout(trained, tmp_path):
    refused("mindspore-to-hf", DEMO, "not a MindSpore layout of DeepSeek-V3, but huggingface")
    refused("demo-to-hf", DEMO, "no model{i}-mp{n}.safetensors")
    served = convert("train-to-infer", trained, tmp_path / "served")
    refused("train-to-infer", served, "is in the inference layout already")


def test_a_model_by_name_or_file(trained, tmp_path):
    config = trained / "config.json"
    elsewhere = config.rename(tmp_path / "elsewhere.json")
    refused("mindspore-to-hf", trained, "no config.json: .*: give --config")
    refused("mindspore-to-hf", trained, "missing: |is \\[", config="deepseek_v3")
    refused("mindspore-to-hf", trained, "unknown model 'deepseek_v8'", config="deepseek_v8")
    out = convert("mindspore-to-hf", trained, tmp_path / "out", config=str(elsewhere))
    assert json.loads((out / "config.json").read_text())["hidden_size"] == SPECS["v3"].hidden_size


def test_rank_files_that_disagree(tmp_path):
    cut = convert("hf-to-demo", convert("fp8-to-bf16", DEMO, tmp_path / "bf16"), tmp_path / "demo", ranks=2)
    second = cut / "model1-mp2.safetensors"
    tensors = shards.read(second)
    dtype, shape, data = tensors["norm.weight"]
    shards.write(second, {**tensors, "norm.weight": (dtype, shape, bytes(len(data)))})
    with pytest.raises(InputError, match="norm.weight differs from the copy in model0-mp2"):
        convert("demo-to-hf", cut, tmp_path / "hf")
    shards.write(second, {key: value for key, value in tensors.items() if key != "norm.weight"})
    refused("demo-to-hf", cut, "missing: norm.weight: .*model1-mp2")
    shards.write(second, {**tensors, "layers.0.extra.weight": ("F32", [1], bytes(4))})
    refused("demo-to-hf", cut, "no parameter for: layers.0.extra.weight")
    second.unlink()
    refused("demo-to-hf", cut, "missing: model1-mp2.safetensors")


def test_a_link_out_of_the_checkpoint_is_not_copied(demo, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (demo / "notes.txt").symlink_to(secret)
    refused("fp8-to-bf16", demo, "link to outside of the checkpoint")


def test_a_changed_value_changes_the_result(tmp_path):
    """The comparison that the other tests rest on can fail."""
    source = write_random(tmp_path / "source", SPECS["v3"])
    before = stored(convert("hf-to-mindspore", source, tmp_path / "a"))
    change(source, Q_A, lambda weight: weight[0, 0].fill_(1.25))
    after = stored(convert("hf-to-mindspore", source, tmp_path / "b"))
    with pytest.raises(AssertionError, match="q2l_proj"):
        assert_same_tensors(before, after)
