"""``quantize`` end to end: every format from BF16 and from FP8, read back by ours and by compressed-tensors' reader."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors.torch import load_file

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.executor import run_plan
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import parameters
from tests.convert.encoders import FORMATS, SPEC, encode_model, write

Tensors = dict[str, torch.Tensor]
Q_A = "model.layers.0.self_attn.q_a_proj"
KV_B = "model.layers.0.self_attn.kv_b_proj"
EXPERT = "model.layers.1.mlp.experts.4.down_proj"
QUANTISED = [param for param in parameters(SPEC) if param.quantised]


def convert(kind: str, source: Path, destination: Path, **options) -> Path:
    plan = KINDS[kind].plan(source, Options(**options))
    try:
        run_plan(plan, destination, workers=3)
    finally:
        plan.close()
    return destination


def read_all(directory: Path) -> Tensors:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@contextmanager
def opened(directory: Path) -> Iterator[CheckpointWeights]:
    with Checkpoint.open(directory) as checkpoint:
        yield CheckpointWeights(checkpoint, spec_from_hf(checkpoint.config, "config.json"))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view({1: torch.uint8, 2: torch.uint16, 4: torch.int32}[tensor.itemsize]).numpy()


def same_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        np.testing.assert_array_equal(bits(tensor), bits(right[name]), name)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("bf16"), encode_model(SPEC, FORMATS["bf16"])[0])
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling_deepseek.py").write_text("raise SystemExit")
    return directory


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp8"), encode_model(SPEC, FORMATS["fp8"])[0], FORMATS["fp8"].config)


@pytest.fixture(scope="module")
def fp8_as_bf16(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("dequantize", fp8, tmp_path_factory.mktemp("fp8-as-bf16") / "out")


# compressed-tensors --------------------------------------------------------------------------------------------------


def library_codes(weight: torch.Tensor) -> Tensors:
    """INT8 codes and scales as compressed-tensors makes them."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return BaseCompressor.get_value_from_registry("int-quantized").compress(state, scheme)


def test_w8a8_ct_is_what_compressed_tensors_makes_and_reads(bf16: Path, tmp_path: Path) -> None:
    source = read_all(bf16)
    made = read_all(convert("quantize", bf16, tmp_path / "out", format="w8a8-ct"))
    expected: Tensors = {}
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if any(param.name == name for param in QUANTISED) and "kv_b_proj" not in name:
            expected |= {f"{module}.{part}": array for part, array in library_codes(tensor).items()}
        else:
            expected[name] = tensor
    same_tensors(made, expected)

    library = CompressedTensorsDequantizer(tmp_path / "out").process(dict(made))
    with opened(tmp_path / "out") as weights:
        assert library.keys() == set(weights.names())
        for name in weights.names():
            ours = weights.read(name, "f32" if library[name].dtype == torch.float32 else "bf16")
            np.testing.assert_array_equal(ours.view(np.uint8), library[name].view(torch.uint8).numpy(), name)


def test_w8a8_ct_config(bf16: Path, tmp_path: Path) -> None:
    config = config_of(convert("quantize", bf16, tmp_path / "out", format="w8a8-ct"))
    declared = QuantizationConfig.model_validate(config["quantization_config"])
    assert declared.format == "int-quantized" and declared.quantization_status == "compressed"
    (group,) = declared.config_groups.values()
    assert group.weights.strategy == "channel" and group.weights.num_bits == 8 and group.weights.symmetric
    assert group.input_activations.strategy == "token" and group.input_activations.dynamic is True
    kv_b = {f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(3)}
    others = {"lm_head", "model.embed_tokens", "model.layers.2.eh_proj", "model.layers.2.shared_head.head"}
    others.add("model.layers.2.embed_tokens")
    assert set(declared.ignore) == kv_b | others | {f"model.layers.{layer}.mlp.gate" for layer in (1, 2)}
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "modeling_deepseek.py").is_file()


@pytest.mark.parametrize("name", ["w8a8-ct", "w8a8-ascend"])
def test_from_fp8_equals_from_its_bf16_copy(name: str, fp8: Path, fp8_as_bf16: Path, tmp_path: Path) -> None:
    direct = convert("quantize", fp8, tmp_path / "direct", format=name)
    detour = convert("quantize", fp8_as_bf16, tmp_path / "detour", format=name)
    same_tensors(read_all(direct), read_all(detour))
    assert config_of(direct) == config_of(detour)


# Ascend --------------------------------------------------------------------------------------------------------------


def test_w8a8_ascend_tensors_and_description(bf16: Path, tmp_path: Path) -> None:
    source, out = read_all(bf16), convert("quantize", bf16, tmp_path / "out", format="w8a8-ascend")
    made = read_all(out)
    description = json.loads((out / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W8A8_DYNAMIC" and description["version"] == "1.0.0"
    assert made.keys() == {key for key in description if "." in key}
    for param in QUANTISED:
        module = param.name.removesuffix(".weight")
        if "kv_b_proj" in module:
            assert description[param.name] == "FLOAT" and made[param.name].dtype == torch.bfloat16
            continue
        values = source[param.name].float()
        scale = made[f"{module}.weight_scale"]
        assert torch.equal(scale, values.abs().amax(1, keepdim=True) / 127)
        assert torch.equal(made[param.name], (values / scale).round().to(torch.int8))
        assert torch.equal(made[f"{module}.weight_offset"], torch.zeros(param.shape[0], 1))
        parts = ("weight", "weight_scale", "weight_offset")
        assert {description[f"{module}.{part}"] for part in parts} == {"W8A8_DYNAMIC"}
    assert description["model.layers.1.mlp.gate.weight"] == description["lm_head.weight"] == "FLOAT"
    assert description["model.norm.weight"] == "FLOAT"
    assert "quantization_config" not in config_of(out)
    assert (out / "quant_model_weights.safetensors").is_file()
    assert (out / "quant_model_weights.safetensors.index.json").is_file()


# MindSpore -----------------------------------------------------------------------------------------------------------


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and BF16 scales [N] of a [N, K] weight: the scale is rounded first, the codes follow it."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale[:, 0]


@pytest.mark.parametrize("variant", [{}, {"qkv_concat": True, "ffn_concat": True, "mtp_names": True}])
def test_w8a8_mindspore_is_the_inference_layout_quantised(variant: dict, fp8: Path, tmp_path: Path) -> None:
    plain = read_all(convert("hf-to-mindspore", fp8, tmp_path / "bf16", **variant))
    out = convert("quantize", fp8, tmp_path / "out", format="w8a8-mindspore", **variant)
    expected: Tensors = {}
    kept = (
        "lkv2kv",
        "router",
        "norm",
        "lm_head",
        "embedding",
        "tok_embeddings",
        "eh_proj",
        "shared_head",
        "mtp_model.h",
    )
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if any(part in name for part in kept):
            expected[name] = tensor
        elif tensor.ndim == 2:
            expected[f"{module}._layer.weight"], expected[f"{module}._layer.matmul.weight_scale"] = int8_rows(tensor)
        else:
            made = [int8_rows(expert.T) for expert in tensor]
            expected[f"{module}._layer.weight"] = torch.stack([codes.T for codes, _ in made])
            expected[f"{module}._layer.matmul.weight_scale"] = torch.stack([scale for _, scale in made])
    made = read_all(out)
    same_tensors(made, expected)
    assert sum(tensor.dtype == torch.int8 for tensor in made.values()) > 15
    places = json.loads((out / "param_name_map.json").read_text())
    assert places == {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}


def test_calibrated_mindspore(bf16: Path, tmp_path: Path) -> None:
    module, ours = "model.layers.0.self_attn.q_b_proj", "model.layers.0.attention.l2q_proj"
    scales = tmp_path / "scales.json"
    scales.write_text(json.dumps({f"{module}.input_scale": 0.0625, f"{module}.input_offset": 5}))
    plain = read_all(convert("hf-to-mindspore", bf16, tmp_path / "bf16"))[f"{ours}.weight"].float()
    made = read_all(convert("quantize", bf16, tmp_path / "out", format="w8a8-mindspore", calibration=scales))
    scale = plain.abs().amax(1) / 127
    codes = made[f"{ours}._layer.weight"]
    assert torch.equal(codes, (plain / scale[:, None]).round().to(torch.int8))
    assert torch.equal(made[f"{ours}._layer.matmul.dequant_scale"], scale * 0.0625)
    assert torch.equal(made[f"{ours}._layer.matmul.quant_bias"], (-5 * codes.long().sum(1)).int())
    assert made[f"{ours}.quant_op.input_scale"].tolist() == [0.0625]
    assert made[f"{ours}.quant_op.input_zp"].tolist() == [5] and not made[f"{ours}.quant_op.beta"].any()
    assert f"{ours}._layer.matmul.weight_scale" not in made
    with pytest.raises(InputError, match=r"qkv2l.weight holds 2 modules, and .* has an input scale: --calibration: "):
        KINDS["quantize"].plan(
            bf16, Options(format="w8a8-mindspore", calibration=_with(scales, f"{Q_A}.input_scale"), qkv_concat=True)
        )


def _with(scales: Path, name: str) -> Path:
    scales.write_text(json.dumps({**json.loads(scales.read_text()), name: 0.5}))
    return scales


def test_experts_are_ignored_together(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ffn\.w2\.weight holds .* which is ignored, and .* which is not: --ignore: "):
        KINDS["quantize"].plan(bf16, Options(format="w8a8-mindspore", ignore=(EXPERT,)))
    ignore = ("model.layers.1.mlp.experts.*.down_proj",)
    made = read_all(convert("quantize", bf16, tmp_path / "out", format="w8a8-mindspore", ignore=ignore))
    assert made["model.layers.1.feed_forward.routed_experts.ffn.w2.weight"].dtype == torch.bfloat16
    assert made["model.layers.1.feed_forward.routed_experts.ffn.w1._layer.weight"].dtype == torch.int8


# FP8 -----------------------------------------------------------------------------------------------------------------


def test_fp8_is_the_published_form(bf16: Path, tmp_path: Path) -> None:
    source, out = read_all(bf16), convert("quantize", bf16, tmp_path / "out", format="fp8")
    made, config = read_all(out), config_of(out)
    assert config["quantization_config"] == FORMATS["fp8"].config
    assert {name for name in made if name.endswith("_scale_inv")} == {f"{param.name}_scale_inv" for param in QUANTISED}
    for param in QUANTISED:
        weight, codes, scales = source[param.name].float(), made[param.name], made[f"{param.name}_scale_inv"]
        for r in range(0, param.shape[0], 128):
            for c in range(0, param.shape[1], 128):
                block, scale = weight[r : r + 128, c : c + 128], scales[r // 128, c // 128]
                assert scale == block.abs().max() / 448
                expected = (block / scale).to(torch.float8_e4m3fn).view(torch.uint8)
                assert torch.equal(codes[r : r + 128, c : c + 128].view(torch.uint8), expected), param.name
    with opened(out) as weights:
        assert weights.format(f"{KV_B}.weight") == "fp8_block"


def test_fp8_of_fp8_is_refused(fp8: Path) -> None:
    with pytest.raises(InputError, match=r"\.weight is FP8 already: "):
        KINDS["quantize"].plan(fp8, Options(format="fp8"))


# Choices -------------------------------------------------------------------------------------------------------------


def test_ignored_modules_stay_and_are_declared(bf16: Path, tmp_path: Path) -> None:
    ignore = (Q_A, "model.layers.1.mlp.experts.*")
    out = convert("quantize", bf16, tmp_path / "ct", format="w8a8-ct", ignore=ignore)
    made, declared = read_all(out), config_of(out)["quantization_config"]["ignore"]
    assert {Q_A, EXPERT} <= set(declared) and "model.layers.2.mlp.experts.4.down_proj" not in declared
    for name in (f"{Q_A}.weight", f"{EXPERT}.weight"):
        assert torch.equal(made[name], read_all(bf16)[name])
    out = convert("quantize", bf16, tmp_path / "fp8", format="fp8", ignore=ignore)
    assert Q_A in config_of(out)["quantization_config"]["modules_to_not_convert"]


CALIBRATION = {f"{Q_A}.input_scale": 0.0625, f"{Q_A}.input_offset": -9, f"{EXPERT}.input_scale": 0.125}


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(CALIBRATION))
    return path


def test_calibrated_compressed_tensors(bf16: Path, scales: Path, tmp_path: Path) -> None:
    out = convert("quantize", bf16, tmp_path / "out", format="w8a8-ct", calibration=scales)
    made, config = read_all(out), QuantizationConfig.model_validate(config_of(out)["quantization_config"])
    assert made[f"{Q_A}.input_scale"].tolist() == [0.0625] and made[f"{Q_A}.input_zero_point"].tolist() == [-9]
    assert made[f"{EXPERT}.input_scale"].tolist() == [0.125] and f"{EXPERT}.input_zero_point" not in made
    groups = {tuple(group.targets): group.input_activations for group in config.config_groups.values()}
    assert groups.keys() == {("Linear",), (Q_A,), (EXPERT,)}
    assert [groups[target].symmetric for target in ((Q_A,), (EXPERT,))] == [False, True]
    assert not groups[(Q_A,)].dynamic and groups[(Q_A,)].strategy == "tensor"
    with opened(out) as weights:
        assert weights.format(f"{Q_A}.weight") == "int8_channel"


def test_calibrated_ascend(bf16: Path, scales: Path, tmp_path: Path) -> None:
    out = convert("quantize", bf16, tmp_path / "out", format="w8a8-ascend", calibration=scales)
    made = read_all(out)
    description = json.loads((out / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W8A8"
    assert description[f"{Q_A}.quant_bias"] == description[f"{Q_A}.weight"] == "W8A8"
    assert description["model.layers.0.self_attn.o_proj.weight"] == "W8A8_DYNAMIC"
    codes = made[f"{Q_A}.weight"]
    assert torch.equal(made[f"{Q_A}.deq_scale"], made[f"{Q_A}.weight_scale"][:, 0] * 0.0625)
    assert torch.equal(made[f"{Q_A}.quant_bias"], (codes.long().sum(1) * 9).int())
    assert made[f"{Q_A}.input_offset"].tolist() == [-9.0]


def test_a_plan_depends_on_what_the_calibration_file_says(bf16: Path, scales: Path) -> None:
    def options() -> object:
        plan = KINDS["quantize"].plan(bf16, Options(format="w8a8-ct", calibration=scales))
        plan.close()
        return plan.options

    before = options()
    assert options() == before
    scales.write_text(json.dumps({**CALIBRATION, f"{Q_A}.input_scale": 0.03125}))
    assert options() != before


def test_dropping_the_mtp_layer(bf16: Path, tmp_path: Path) -> None:
    out = convert("quantize", bf16, tmp_path / "out", format="w8a8-ct", drop_mtp=True)
    assert config_of(out)["num_nextn_predict_layers"] == 0
    assert not any(".layers.2." in name for name in read_all(out))
    assert not any(".layers.2." in name for name in config_of(out)["quantization_config"]["ignore"])


def test_small_shards_hold_the_same(bf16: Path, tmp_path: Path) -> None:
    whole = convert("quantize", bf16, tmp_path / "whole", format="w8a8-ascend")
    split = convert("quantize", bf16, tmp_path / "split", format="w8a8-ascend", shard_bytes=50_000)
    assert len(list(split.glob("quant_model_weights-*.safetensors"))) > 5
    same_tensors(read_all(whole), read_all(split))
    with opened(split) as weights:
        assert weights.has_mtp


def test_quantising_what_is_int4_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "gptq", encode_model(SPEC, FORMATS["gptq v1"])[0], FORMATS["gptq v1"].config)
    plan = KINDS["quantize"].plan(source, Options(format="w8a8-ct"))
    plan.close()
    assert plan.notes[0].endswith("weights are gptq and are rounded a second time")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (Options(), "no --format: quantize: give one of w8a8-ct, w8a8-ascend, "),
        (Options(format="w8a8"), "unknown format 'w8a8': --format: did you mean w8a8-"),
        (Options(format="w8a8-ct", ignore=("q_a_proj",)), "no quantised module is called 'q_a_proj': --ignore: "),
        (Options(format="w8a8-ct", ignore=("*",)), "nothing is left to quantise: --ignore: "),
        (Options(format="w8a8-ct", ffn_concat=True), "w8a8-ct has no such variant: --ffn-concat: "),
        (Options(format="w8a8-mindspore", shard_bytes=1), "w8a8-mindspore has its own files: --shard-size: "),
        (Options(format="fp8", calibration=Path("x.json")), "fp8 has no static scales: --calibration: "),
    ],
)
def test_choices_that_do_not_fit(options: Options, what: str, bf16: Path) -> None:
    with pytest.raises(InputError) as caught:
        KINDS["quantize"].plan(bf16, options)
    assert str(caught.value).startswith(what)


# Back to BF16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("bf16", "f16", "f32")])
def test_dequantize(name: str, tmp_path: Path) -> None:
    tensors, values = encode_model(SPEC, FORMATS[name])
    source = write(tmp_path / "source", tensors, FORMATS[name].config)
    (source / "quant_model_description_w8a8_dynamic.json").write_text("{}")
    out = convert("dequantize", source, tmp_path / "out")
    made = read_all(out)
    assert made.keys() == {param.name for param in parameters(SPEC)}
    for param in parameters(SPEC):
        expected = torch.from_numpy(values[param.name])
        assert torch.equal(made[param.name], expected if param.dtype == "F32" else expected.bfloat16()), param.name
    config = config_of(out)
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert not list(out.glob("quant_model_description*"))


def test_dequantize_keeps_what_is_plain(tmp_path: Path) -> None:
    tensors, _ = encode_model(SPEC, FORMATS["awq"])
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm].half()
    out = convert("dequantize", write(tmp_path / "source", tensors, FORMATS["awq"].config), tmp_path / "out")
    assert read_all(out)[norm].dtype == torch.float16


def test_dequantising_bf16_is_noted(bf16: Path) -> None:
    plan = KINDS["dequantize"].plan(bf16, Options())
    plan.close()
    assert plan.notes == ("no weight is quantised: every tensor is copied as it is",)
