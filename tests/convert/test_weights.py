"""CheckpointWeights against the formats' definitions: whole weights, every window, and everything that is wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.random_weights import RandomWeights
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.catalog import load_spec
from deepspan.models.dtypes import bf16_to_f32
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import parameters
from deepspan.models.spec import ModelSpec
from tests.convert.encoders import FORMATS, SPEC, Format, awq, ct_config, encode_model, packed, write

ROOT = Path(__file__).resolve().parents[2]
WIDE = "model.layers.0.mlp.gate_proj.weight"  # [264, 136]
Tensors = dict[str, torch.Tensor]


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even by torch, as bit patterns."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def open_weights(directory: Path, spec: ModelSpec = SPEC) -> CheckpointWeights:
    return CheckpointWeights(Checkpoint.open(directory), spec)


class Stored:
    """A written checkpoint in one format, opened, and its true values."""

    def __init__(self, name: str, directory: Path):
        self.format = FORMATS[name]
        self.tensors, self.values = encode_model(SPEC, self.format)
        self.directory = write(directory, self.tensors, self.format.config)
        self.checkpoint = Checkpoint.open(directory)
        self.weights = CheckpointWeights(self.checkpoint, SPEC)


@pytest.fixture(scope="module", params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    stored = Stored(request.param, tmp_path_factory.mktemp("format"))
    yield stored
    stored.checkpoint.close()


def test_whole_weights(stored: Stored) -> None:
    weights = stored.weights
    assert weights.names() == [param.name for param in parameters(SPEC)]
    assert weights.has_mtp and not weights.shared
    for param in parameters(SPEC):
        read = weights.read(param.name, "f32")
        assert read.dtype == np.float32 and read.shape == param.shape == weights.shape(param.name)
        np.testing.assert_array_equal(read, stored.values[param.name], err_msg=param.name)
        np.testing.assert_array_equal(weights.read(param.name, "bf16"), bf16(stored.values[param.name]))
        assert weights.format(param.name) == (stored.format.name if param.quantised else param.dtype.lower())


@st.composite
def windows(draw: st.DrawFn) -> tuple[str, tuple[int, int] | None, tuple[int, int] | None]:
    """A matrix and a window of it; ends are drawn near the borders of blocks, groups and words too."""
    param = draw(st.sampled_from([param for param in parameters(SPEC) if param.layer in (0, 1)]))

    def ranges(size: int) -> st.SearchStrategy[tuple[int, int] | None]:
        borders = [at for unit in (8, 32, 128) for edge in range(unit, size, unit) for at in (edge - 1, edge, edge + 1)]
        ends = st.integers(0, size) | st.sampled_from([0, size, *borders])
        return st.none() | st.tuples(ends, ends).map(lambda pair: (min(pair), min(max(pair), size)))

    return param.name, draw(ranges(param.shape[0])), draw(ranges(param.shape[1])) if len(param.shape) == 2 else None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(window=windows(), dtype=st.sampled_from(["f32", "bf16"]))
def test_windows_are_slices_of_the_whole(stored: Stored, window, dtype: str) -> None:
    name, rows, cols = window
    values = stored.values[name]
    expected = values[slice(*rows or (None,))]
    expected = expected if cols is None else expected[:, slice(*cols)]
    read = stored.weights.read(name, dtype, rows, cols)
    np.testing.assert_array_equal(read, expected if dtype == "f32" else bf16(expected))


def test_windows_across_block_borders(stored: Stored) -> None:
    for rows, cols in (((120, 264), (125, 136)), ((127, 129), (31, 33)), ((128, 128), (0, 136)), ((5, 6), (135, 136))):
        read = stored.weights.read(WIDE, "f32", rows, cols)
        np.testing.assert_array_equal(read, stored.values[WIDE][slice(*rows), slice(*cols)])


def test_parts_are_the_stored_tensors(stored: Stored) -> None:
    """Whole codes come raw, whole scales in FP32."""
    parts, prefix = stored.weights.parts(WIDE), WIDE.removesuffix("weight")
    by_part = {name.removeprefix(prefix): tensor for name, tensor in stored.tensors.items() if name.startswith(prefix)}
    by_part = {{"scale": "weight_scale_inv"}.get(part, part): tensor for part, tensor in by_part.items()}
    if stored.format.name == "fp8_block" and "weight_scale" in by_part:
        by_part["weight_scale_inv"] = by_part.pop("weight_scale")
    assert parts.keys() == by_part.keys()
    for part, tensor in by_part.items():
        raw = part == "weight" or not tensor.dtype.is_floating_point
        expected = tensor.contiguous().view(torch.uint8).numpy() if raw else tensor.float().numpy()
        np.testing.assert_array_equal(parts[part].view(np.uint8) if raw else parts[part], expected)


# Against compressed-tensors' own readers -----------------------------------------------------------------------------


def read_all(directory: Path) -> Tensors:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def same_as_library(directory: Path, library: Tensors) -> None:
    weights = open_weights(directory)
    for param in parameters(SPEC):
        if param.quantised:
            read = weights.read(param.name, "bf16")
            np.testing.assert_array_equal(read, library[param.name].bfloat16().view(torch.uint16).numpy(), param.name)


EIGHTS = {  # the library wants whole groups
    symmetric: Format("ct_int4", packed(symmetric, group=8), ct_config("pack-quantized", 4, symmetric, group_size=8))
    for symmetric in (True, False)
}


@pytest.mark.parametrize("form", [*EIGHTS.values(), FORMATS["int-quantized"]], ids=["int4", "int4 zeros", "int8"])
def test_compressed_tensors_reads_the_same(form: Format, tmp_path: Path) -> None:
    tensors, _ = encode_model(SPEC, form)
    write(tmp_path, tensors, form.config | {"ignore": ["re:.*gate$", "re:.*(embed_tokens|head|eh_proj)"]})
    library = CompressedTensorsDequantizer(tmp_path).process(read_all(tmp_path))
    same_as_library(tmp_path, library)


@pytest.mark.parametrize("name", ["fp8", "fp8, BF16 scales", "fp8, small blocks"])
def test_compressed_tensors_reads_the_same_fp8(name: str, tmp_path: Path) -> None:
    tensors, _ = encode_model(SPEC, FORMATS[name])
    write(tmp_path, tensors, FORMATS[name].config)
    block = tuple(FORMATS[name].config["weight_block_size"])
    converter = FP8BlockDequantizer.from_pretrained(tmp_path, weight_block_size=block)
    same_as_library(tmp_path, converter.process(read_all(tmp_path)))


def test_compressed_tensors_reads_the_same_awq(tmp_path: Path) -> None:
    """Its converter makes AWQ pack-quantized, whose products it then rounds to the scales' FP16: compared there."""
    form = Format("awq", awq(group=8), FORMATS["awq"].config | {"group_size": 8})
    tensors, _ = encode_model(SPEC, form)
    weights = open_weights(write(tmp_path, tensors, form.config))
    converter = AutoAWQConverter(group_size=8)
    library = converter.process(dict(tensors))
    scheme: QuantizationScheme = converter.update_config(None).config_groups["config_group_0"]
    prefix = WIDE.removesuffix("weight")
    state = {name.removeprefix(prefix): tensor for name, tensor in library.items() if name.startswith(prefix)}
    weight = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(weight.numpy(), weights.read(WIDE, "f32").astype(np.float16))


# What is wrong -------------------------------------------------------------------------------------------------------

Q_A = "model.layers.0.self_attn.q_a_proj"  # [40, 136]
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def drop(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


FAULTS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "missing norm": ("bf16", drop(NORM), f"missing: {NORM}: {{home}}: "),
    "missing expert": ("fp8", drop(f"{EXPERT}.weight", f"{EXPERT}.weight_scale_inv"), f"missing: {EXPERT}.weight: "),
    "extra tensor": ("bf16", put("model.extra", torch.ones(3)), "no parameter for: model.extra: {home}/model-0000"),
    "expert too many": (
        "bf16",
        put("model.layers.1.mlp.experts.6.up_proj.weight", torch.ones(24, 136)),
        "no parameter for: model.layers.1.mlp.experts.6.up_proj.weight: ",
    ),
    "second MTP layer": (
        "bf16",
        put("model.layers.3.enorm.weight", torch.ones(136)),
        "no parameter for: model.layers.3.enorm.weight: ",
    ),
    "norm bias of outlier suppression": (
        "bf16",
        put("model.layers.0.input_layernorm.bias", torch.ones(136)),
        "no parameter for: model.layers.0.input_layernorm.bias: ",
    ),
    "misshapen norm": ("bf16", put(NORM, torch.ones(135)), f"{NORM} is [135], not [136]: {{home}}/model-0000"),
    "transposed weight": (
        "bf16",
        put(f"{Q_A}.weight", torch.ones(136, 40)),
        f"{Q_A}.weight is [136, 40], not [40, 136]: ",
    ),
    "integer norm": (
        "bf16",
        put(NORM, torch.ones(136, dtype=torch.int32)),
        f"{NORM} is I32, not BF16 or F16 or F32: ",
    ),
    "int16 weight": (
        "bf16",
        put(f"{Q_A}.weight", torch.ones(40, 136, dtype=torch.int16)),
        f"{Q_A}.weight is I16, not BF16 or F16 or F32: ",
    ),
    "FP8 norm": ("fp8", put(NORM, torch.ones(136).to(torch.float8_e4m3fn)), f"{NORM} is F8_E4M3, not BF16 or F16 or"),
    "FP8 without scale": (
        "fp8",
        drop(f"{Q_A}.weight_scale_inv"),
        f"{Q_A}.weight is F8_E4M3 and has no {Q_A}.weight_scale_inv: {{home}}/model-0000",
    ),
    "INT8 without scale": (
        "int8 channels, F32",
        drop(f"{Q_A}.weight_scale"),
        f"{Q_A}.weight is I8 and has no {Q_A}.weight_scale: ",
    ),
    "scale without FP8": (
        "fp8",
        put(f"{Q_A}.weight", torch.ones(40, 136)),
        f"no parameter for: {Q_A}.weight_scale_inv: ",
    ),
    "scale of another shape": (
        "fp8",
        put(f"{Q_A}.weight_scale_inv", torch.ones(2, 2)),
        f"{Q_A}.weight_scale_inv is [2, 2], not [1, 2], which blocks of 128 x 128 ",
    ),
    "integer scale": (
        "fp8",
        put(f"{Q_A}.weight_scale_inv", torch.ones(1, 2, dtype=torch.int32)),
        f"{Q_A}.weight_scale_inv is I32, not F32 or ",
    ),
    "two kinds of FP8 scale": (
        "fp8",
        put(f"{Q_A}.scale", torch.ones(1, 2)),
        f"no parameter for: {Q_A}.scale: ",
    ),
    "stored twice": (
        "gptq v1",
        put(f"{Q_A}.weight", torch.ones(40, 136)),
        f"stored twice: {Q_A}.weight and {Q_A}.qweight: ",
    ),
    "INT4 without zeros": (
        "gptq v1",
        drop(f"{Q_A}.qzeros"),
        f"{Q_A}.qweight is I32 and has no {Q_A}.qzeros: ",
    ),
    "INT4 of another packing": (
        "awq",
        put(f"{Q_A}.qweight", torch.ones(17, 40, dtype=torch.int32)),
        f"{Q_A}.qweight is [17, 40], not [136, 5], which awq ",
    ),
    "scales of another group size": (
        "gptq v1",
        put(f"{Q_A}.scales", torch.ones(2, 40)),
        f"{Q_A}.scales is [2, 40], not [5, 40], which group_size 32 ",
    ),
    "zero points where none are declared": (
        "pack-quantized",
        put(f"{Q_A}.weight_zero_point", torch.ones(5, 5, dtype=torch.int32)),
        "symmetric is True and the checkpoint has zero points: {home}/config.json: quantization_config: ",
    ),
    "partial MTP layer": ("bf16", drop("model.layers.2.enorm.weight"), "missing: model.layers.2.enorm.weight: "),
    "MTP layer without an expert": (
        "bf16",
        drop("model.layers.2.mlp.experts.0.up_proj.weight"),
        "missing: model.layers.2.mlp.experts.0.up_proj.weight: ",
    ),
    "only the MTP layer's head": (
        "bf16",
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if "layers.2." in name and "shared_head.head" not in name
        ]
        and None,
        "missing: model.layers.2.enorm.weight, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_refused_and_named(case: str, tmp_path: Path) -> None:
    name, damage, message = FAULTS[case]
    tensors, _ = encode_model(SPEC, FORMATS[name])
    damage(tensors)
    write(tmp_path, tensors, FORMATS[name].config)
    with pytest.raises(InputError) as caught:
        open_weights(tmp_path)
    assert str(caught.value).startswith(message.format(home=tmp_path)) and "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[str, dict, str]] = {
    "INT4 undeclared": ("gptq v1", {}, "quant_method is None and the checkpoint has qweight tensors"),
    "INT4 of an unknown method": ("awq", {"quant_method": "hqq"}, "quant_method is 'hqq' and the checkpoint has"),
    "three bits": ("gptq v1", FORMATS["gptq v1"].config | {"bits": 3}, "bits is 3"),
    "no group size": ("gptq v1", {"quant_method": "gptq", "bits": 4}, "group_size is None and"),
    "group size of zero": ("awq", FORMATS["awq"].config | {"group_size": 0}, "group_size is 0 and"),
    "unknown zero convention": (
        "gptq v1",
        FORMATS["gptq v1"].config | {"checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin'",
    ),
    "awq for another kernel": ("awq", FORMATS["awq"].config | {"version": "gemv"}, "awq version is 'gemv'"),
    "awq with g_idx": ("gptq v1", FORMATS["awq"].config, "quant_method is awq and the checkpoint has g_idx tensors"),
    "packed undeclared": ("pack-quantized", {}, "weights are packed and no config_groups entry has num_bits 4"),
    "asymmetric without zero points": (
        "pack-quantized",
        FORMATS["pack-quantized, zero points"].config,
        "symmetric is False and the checkpoint lacks zero points",
    ),
    "block size of zero": ("fp8", {"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_declarations_that_do_not_fit(case: str, tmp_path: Path) -> None:
    name, config, message = CONFIGS[case]
    write(tmp_path, encode_model(SPEC, FORMATS[name])[0], config)
    with pytest.raises(InputError) as caught:
        open_weights(tmp_path)
    assert str(caught.value).startswith(message)
    assert f": {tmp_path}/config.json: quantization_config: " in str(caught.value)


def test_quantization_config_that_is_a_list(tmp_path: Path) -> None:
    write(tmp_path, encode_model(SPEC, FORMATS["bf16"])[0])
    (tmp_path / "config.json").write_text('{"quantization_config": [1]}')
    with pytest.raises(InputError, match="^quantization_config is not an object: "):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("gptq, desc_act", "g_idx", torch.full((136,), 5, dtype=torch.int32), "g_idx names groups outside of 0..4"),
        ("gptq, desc_act", "g_idx", torch.full((136,), -1, dtype=torch.int32), "g_idx names groups outside of 0..4"),
        ("pack-quantized", "weight_shape", torch.tensor([40, 128]), r"weight_shape says \[40, 128\], the model has"),
    ],
)
def test_data_that_contradicts_the_model(name: str, part: str, value: torch.Tensor, message: str, tmp_path) -> None:
    tensors, _ = encode_model(SPEC, FORMATS[name])
    tensors[f"{Q_A}.{part}"] = value
    weights = open_weights(write(tmp_path, tensors, FORMATS[name].config))
    with pytest.raises(InputError, match=message):
        weights.read(f"{Q_A}.weight", "bf16")


# Legal absences ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_mtp_layer_is_complete(tmp_path: Path) -> None:
    tensors, values = encode_model(SPEC, FORMATS["fp8"])
    main = {name: tensor for name, tensor in tensors.items() if "layers.2." not in name}
    weights = open_weights(write(tmp_path, main, FORMATS["fp8"].config))
    assert not weights.has_mtp
    assert weights.names() == [param.name for param in parameters(SPEC, mtp=False)]
    np.testing.assert_array_equal(weights.read(WIDE, "f32"), values[WIDE])


def test_mtp_tensors_that_the_config_does_not_declare(tmp_path: Path) -> None:
    write(tmp_path, encode_model(SPEC, FORMATS["bf16"])[0])
    with pytest.raises(InputError, match="set num_nextn_predict_layers to the number of MTP layers"):
        open_weights(tmp_path, SPEC.replace({"num_nextn_predict_layers": 0}))


def test_an_mtp_layer_may_share_the_tables(tmp_path: Path) -> None:
    tensors, values = encode_model(SPEC, FORMATS["bf16"])
    embedding, head = "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"
    full = open_weights(write(tmp_path / "full", tensors))
    del tensors[embedding], tensors[head]
    weights = open_weights(write(tmp_path / "shared", tensors))
    assert weights.has_mtp and weights.names() == full.names()
    assert dict(weights.shared) == {embedding: "model.embed_tokens.weight", head: "lm_head.weight"}
    np.testing.assert_array_equal(weights.read(head, "f32", (3, 9)), values["lm_head.weight"][3:9])
    np.testing.assert_array_equal(weights.read(embedding, "f32"), values["model.embed_tokens.weight"])
    assert full.bytes_as("bf16") - weights.bytes_as("bf16") == 2 * 2 * 88 * 136


def test_modules_kept_plain_in_a_quantised_checkpoint(tmp_path: Path) -> None:
    tensors, _ = encode_model(SPEC, FORMATS["gptq v1"])
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{Q_A}.{part}"]
    tensors[f"{Q_A}.weight"] = torch.ones(40, 136, dtype=torch.bfloat16)
    weights = open_weights(write(tmp_path, tensors, FORMATS["gptq v1"].config))
    assert weights.format(f"{Q_A}.weight") == "bf16"
    assert weights.format(WIDE) == "gptq"


def test_a_converted_copy_with_a_stale_quantization_config(tmp_path: Path) -> None:
    tensors, values = encode_model(SPEC, FORMATS["bf16"])
    weights = open_weights(write(tmp_path, tensors, FORMATS["fp8"].config))
    assert weights.format(WIDE) == "bf16"
    np.testing.assert_array_equal(weights.read(WIDE, "f32"), values[WIDE])


def test_without_config_json_the_spec_declares_the_blocks(tmp_path: Path) -> None:
    tensors, values = encode_model(SPEC, FORMATS["fp8, small blocks"])
    write(tmp_path, tensors)
    (tmp_path / "config.json").unlink()
    weights = open_weights(tmp_path, SPEC.replace({"fp8": {"block": [48, 20]}}))
    np.testing.assert_array_equal(weights.read(WIDE, "f32"), values[WIDE])


# Real and random models ----------------------------------------------------------------------------------------------


def test_the_embedded_model_opens() -> None:
    with Checkpoint.open(ROOT / "models" / "demo") as checkpoint:
        spec = spec_from_hf(checkpoint.config, "config.json")
        assert spec == load_spec("demo")
        weights = CheckpointWeights(checkpoint, spec)
        assert weights.has_mtp
        formats = {weights.format(param.name) for param in parameters(spec) if param.quantised}
        assert formats == {"fp8_block"}
        for name in weights.names():
            assert np.isfinite(weights.read(name, "f32")).all(), name
        places = {name: info.path for name, info in checkpoint.tensors.items()}
        assert any(
            places[f"{name}_scale_inv"] != path for name, path in places.items() if f"{name}_scale_inv" in places
        )


def test_random_weights_depend_on_the_name_and_the_position_only() -> None:
    weights, again = RandomWeights(SPEC, seed=5), RandomWeights(SPEC, seed=5)
    for name in reversed(weights.names()):
        whole = again.read(name, "f32")
        np.testing.assert_array_equal(weights.read(name, "f32"), whole)
        if whole.ndim == 2:
            np.testing.assert_array_equal(weights.read(name, "f32", (3, 20), (5, 7)), whole[3:20, 5:7])
        if weights.format(name) == "bf16":
            np.testing.assert_array_equal(bf16_to_f32(weights.read(name, "bf16")), whole)
    assert (RandomWeights(SPEC, seed=6).read(WIDE, "f32") != again.read(WIDE, "f32")).any()
    assert abs(again.read(WIDE, "f32").std() * np.sqrt(136) - 1) < 0.02


def test_random_weights_across_chunks() -> None:
    """Rows are drawn in chunks: a window over the border of two equals the whole."""
    whole = RandomWeights(SPEC).read(WIDE, "f32")
    np.testing.assert_array_equal(RandomWeights(SPEC).read(WIDE, "f32", (250, 262)), whole[250:262])
    assert RandomWeights(SPEC).read(WIDE, "f32", (256, 256)).shape == (0, 136)
    assert len(np.unique(whole, axis=0)) == 264


def test_configs_are_json(tmp_path: Path) -> None:
    """Every declaration of the table survives the trip through config.json."""
    for form in FORMATS.values():
        assert json.loads(json.dumps(form.config)) == form.config
