"""verify --against: checkpoints of any two layouts under canonical names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspan.convert.verify.against import Comparison, compare
from deepspan.convert.verify.views import open_view
from deepspan.models.errors import InputError
from deepspan.models.params import parameters
from tests.cli import shards
from tests.convert import encoders
from tests.convert.checkpoints import DEMO, change, convert, stored, write_random
from tests.specs import SPECS

EXPERT = "model.layers.2.mlp.experts.{}.down_proj.weight"
PARAMETERS = 269  # of the embedded model


def against(a: Path, b: Path, mtp: bool = True) -> Comparison:
    with open_view(a) as first, open_view(b) as second:
        return compare(first, second, 2, lambda done: None, mtp)


def names(found: Comparison) -> list[str]:
    return [difference.name for difference in found.differing]


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    """Every layout that holds the embedded model's weights as they are."""
    folder = tmp_path_factory.mktemp("lossless")
    kinds = {
        "bf16": ("fp8-to-bf16", {}),
        "infer": ("hf-to-mindspore", {}),
        "fused": ("hf-to-mindspore", {"qkv_concat": True, "ffn_concat": True, "mtp_names": True}),
        "train": ("hf-to-mindspore", {"layout": "train"}),
        "grouped": ("hf-to-mindspore", {"layout": "train-grouped", "dtype": "fp32"}),
        "mp1": ("hf-to-demo", {"ranks": 1}),
        "mp4": ("hf-to-demo", {"ranks": 4}),
    }
    made = {name: convert(kind, DEMO, folder / name, **options) for name, (kind, options) in kinds.items()}
    return {"source": DEMO, **made}


def test_every_layout_against_every_other(lossless):
    ring = list(lossless)
    for name, other in zip(ring, [*ring[1:], ring[0]], strict=True):
        found = against(lossless[name], lossless[other])
        assert found.is_equal(rtol=0), (name, other, found)
        assert found.identical == PARAMETERS


@pytest.mark.parametrize(
    ("form", "bound", "plain"),
    [("w8a8-ct", 0.01, 42), ("w8a8-ascend", 0.01, 42), ("w8a8-mindspore", 0.01, 42), ("fp8", 0.005, 37)],
)
def test_quantised_again_is_near(lossless, tmp_path, form, bound, plain):
    """INT8 of rows, and FP8 of what was FP8, whose largest code need not be used in every block."""
    quantised = convert("quantize", lossless["bf16"], tmp_path / "out", format=form)
    found = against(DEMO, quantised)
    assert (found.identical, len(found.differing)) == (plain, PARAMETERS - plain)
    assert found.is_equal(bound) and not found.is_equal(bound / 4) and not found.is_equal(0)
    whole = stored(lossless["bf16"])
    if form == "w8a8-ct":
        codes = stored(quantised)
        for difference in found.differing[:20]:
            weight = whole[difference.name].double()
            module = difference.name.removesuffix(".weight")
            product = codes[difference.name].float() * codes[f"{module}.weight_scale"].float()
            error = product.bfloat16().double() - weight
            assert difference.max_error == error.abs().max()
            assert difference.relative_error == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-9)


def test_what_is_made_of_a_quantised_layout_is_what_it_means(lossless, tmp_path):
    golden = convert("quantize", DEMO, tmp_path / "golden", format="w8a8-mindspore", ffn_concat=True)
    back = convert("mindspore-to-hf", golden, tmp_path / "back")
    assert against(golden, back).identical == PARAMETERS
    ascend = convert("quantize", DEMO, tmp_path / "ascend", format="w8a8-ascend")
    plain = convert("dequantize", ascend, tmp_path / "plain")
    assert against(plain, ascend).identical == PARAMETERS


@pytest.mark.parametrize("form", encoders.FORMATS)
def test_every_stored_format_against_its_values(tmp_path, form):
    spec, chosen = replace(encoders.SPEC, num_nextn_predict_layers=0), encoders.FORMATS[form]
    tensors, values = encoders.encode_model(spec, chosen)
    a = encoders.write(tmp_path / "a", tensors, chosen.config)
    expected = {
        param.name: torch.from_numpy(values[param.name]).to(torch.float32 if param.dtype == "F32" else torch.bfloat16)
        for param in parameters(spec)
    }
    b = encoders.write(tmp_path / "b", expected)
    assert against(a, b).identical == len(expected)


def test_one_element(lossless, tmp_path):
    directory = Path(shutil.copytree(lossless["bf16"], tmp_path / "copy"))
    name = EXPERT.format(3)
    weights = stored(directory)[name].double()

    def edit(tensors: shards.Tensors) -> None:
        dtype, shape, data = tensors[name]
        value = np.frombuffer(data, np.uint16).copy()
        value[777] = 0x4100  # 8
        tensors[name] = dtype, shape, value.tobytes()

    shards.edit(directory, name, edit)
    for other in ("source", "infer", "mp4", "grouped"):
        found = against(lossless[other], directory)
        assert (names(found), found.identical) == ([name], PARAMETERS - 1)
        error = 8 - weights.reshape(-1)[777].item()
        assert found.differing[0].max_error == pytest.approx(error, rel=1e-12)
        assert found.differing[0].relative_error == pytest.approx(error / weights.norm().item(), rel=1e-9)
        assert not found.is_equal(0) and found.is_equal(found.differing[0].relative_error * 1.001)


def test_permuted_experts(lossless, tmp_path):
    directory = Path(shutil.copytree(lossless["mp1"], tmp_path / "copy"))
    path = directory / "model0-mp1.safetensors"
    tensors = shards.read(path)
    swapped = dict(tensors)
    for part in ("w1", "w2", "w3"):
        for end in ("weight", "scale"):
            one, other = (f"layers.2.ffn.experts.{expert}.{part}.{end}" for expert in (0, 5))
            swapped[one], swapped[other] = tensors[other], tensors[one]
    shards.write(path, swapped)
    for other in ("source", "infer"):
        found = against(lossless[other], directory)
        prefix = "model.layers.2.mlp.experts."
        expected = {f"{prefix}{e}.{part}_proj.weight" for e in (0, 5) for part in ("gate", "up", "down")}
        assert set(names(found)) == expected
        assert all(difference.relative_error > 0.5 for difference in found.differing)


def test_missing_mtp_layers(lossless, tmp_path):
    without = convert("hf-to-mindspore", DEMO, tmp_path / "out", drop_mtp=True)
    found = against(DEMO, without)
    assert found.missing and not found.extra and not found.differing
    assert all(name.startswith("model.layers.4.") for name in found.missing)
    assert not found.is_equal(0)
    assert against(without, DEMO).extra == found.missing
    assert against(DEMO, without, mtp=False).is_equal(0)


def test_codes_and_scales_of_one_format_must_be_the_same(tmp_path):
    """Codes twice as large and scales half as large mean the same weight, and are another checkpoint."""
    copy = Path(shutil.copytree(DEMO, tmp_path / "copy"))
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    scale = f"{name}_scale_inv"

    def edit(tensors: shards.Tensors) -> None:
        tensors[name] = (*tensors[name][:2], b"\x38" * len(tensors[name][2]))
        tensors[scale] = (*tensors[scale][:2], np.full(len(tensors[scale][2]) // 4, 0.5, np.float32).tobytes())

    def halve(tensors: shards.Tensors) -> None:
        tensors[name] = (*tensors[name][:2], b"\x40" * len(tensors[name][2]))
        tensors[scale] = (*tensors[scale][:2], np.full(len(tensors[scale][2]) // 4, 0.25, np.float32).tobytes())

    shards.edit(copy, name, edit)
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    shards.edit(other, name, halve)
    found = against(copy, other)
    assert names(found) == [name] and found.differing[0].what == "the same values, but another weight"
    plain = convert("fp8-to-bf16", other, tmp_path / "bf16")
    assert against(copy, plain).is_equal(0)


def test_scales_of_activations_count(tmp_path):
    form = encoders.FORMATS["int-quantized, static"]
    tensors, _ = encoders.encode_model(encoders.SPEC, form)
    a = encoders.write(tmp_path / "a", tensors, form.config)
    scale = next(name for name in tensors if name.endswith("q_a_proj.input_scale"))
    tensors[scale] = tensors[scale] * 1.5
    b = encoders.write(tmp_path / "b", tensors, form.config)
    found = against(a, b)
    assert names(found) == [scale.replace("input_scale", "weight")]
    assert str(found.differing[0]).endswith("another input_scale")
    assert found.differing[0].relative_error == 0.5
    assert found.is_equal(0.6) and not found.is_equal(0.4)


def test_nan_is_never_near(tmp_path):
    a = write_random(tmp_path / "a", SPECS["v3"])
    b = Path(shutil.copytree(a, tmp_path / "b"))
    change(b, "model.norm.weight", lambda weight: weight[1].fill_(float("nan")))
    found = against(a, b)
    assert names(found) == ["model.norm.weight"] and not found.is_equal(1e30)
    assert against(b, b).is_equal(0)
    fp8 = encoders.FORMATS["fp8"]
    c = encoders.write(tmp_path / "c", encoders.encode_model(encoders.SPEC, fp8)[0], fp8.config)
    assert against(c, c).is_equal(0)


def test_another_model(tmp_path):
    a = write_random(tmp_path / "a", SPECS["v3"])
    b = write_random(tmp_path / "b", SPECS["kimi-k2: one group, one beta"], seed=1)
    found = against(a, b)
    assert found.missing and not found.extra and len(names(found)) == len(stored(b))
    c = write_random(tmp_path / "c", SPECS["every second layer MoE, no shared expert"])
    assert against(a, c).extra and against(a, c).missing
    d = write_random(tmp_path / "d", encoders.SPEC)
    shapes = [difference.what for difference in against(a, d).differing]
    assert "[83, 36] and [88, 136]" in shapes and not against(a, d).is_equal(1e30)


def test_what_cannot_be_read_is_an_error(tmp_path, lossless):
    with pytest.raises(InputError, match="not a directory"):
        open_view(tmp_path / "nothing")
    directory = Path(shutil.copytree(lossless["mp4"], tmp_path / "copy"))
    (directory / "model2-mp4.safetensors").unlink()
    with pytest.raises(InputError, match="missing: model2-mp4"):
        open_view(directory)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    shards.write(unknown / "model.safetensors", {"x.weight": ("F32", [1], bytes(4))})
    (unknown / "config.json").write_text(json.dumps(json.loads((DEMO / "config.json").read_text())))
    with pytest.raises(InputError, match="no layout of the DeepSeek-V3 family"):
        open_view(unknown)
