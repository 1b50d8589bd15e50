"""verify: whatever is damaged is found and named, and nothing else is."""

import dataclasses
import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from deepspan.convert.allowances import Allowances
from deepspan.convert.fast_weights import FastWeights
from deepspan.convert.kinds.options import Options as Conversion
from deepspan.convert.kinds.source import open_huggingface
from deepspan.convert.layout_io import LayoutWeights
from deepspan.convert.manifest import MANIFEST_FILE
from deepspan.convert.verify import slow_formats
from deepspan.convert.verify.directory import Options, Verdict, verify
from deepspan.models.errors import InputError
from deepspan.models.params import parameters
from tests.cli import shards
from tests.convert import encoders
from tests.convert.checkpoints import DEMO, convert, write_random
from tests.specs import SPECS

EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"
EXPERT_SIZE = 192 * 96
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
ALL = 10**6  # samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded checkpoint by every kind, with most of their variants."""
    folder = tmp_path_factory.mktemp("made")

    def by(name: str, kind: str, source: Path = DEMO, **options: object) -> Path:
        return convert(kind, source, folder / name, **options)

    found = {
        "bf16": by("bf16", "fp8-to-bf16"),
        "infer": by("infer", "hf-to-mindspore"),
        "infer fused": by("fused", "hf-to-mindspore", qkv_concat=True, ffn_concat=True, mtp_names=True),
        "train": by("train", "hf-to-mindspore", layout="train"),
        "grouped fp32": by("grouped", "hf-to-mindspore", layout="train-grouped", dtype="fp32"),
        "infer fp16": by("fp16", "hf-to-mindspore", dtype="fp16"),
        "infer, no MTP": by("no-mtp", "hf-to-mindspore", drop_mtp=True),
        "mp1": by("mp1", "hf-to-demo", ranks=1),
        "mp4": by("mp4", "hf-to-demo", ranks=4),
        "w8a8-ct": by("ct", "quantize", format="w8a8-ct"),
        "w8a8-ascend": by("ascend", "quantize", format="w8a8-ascend"),
        "w8a8-mindspore": by("golden", "quantize", format="w8a8-mindspore"),
        "w8a8-mindspore fused": by(
            "golden-fused", "quantize", format="w8a8-mindspore", qkv_concat=True, ffn_concat=True
        ),
    }
    found["fp8"] = by("fp8", "quantize", found["bf16"], format="fp8")
    found["from infer"] = by("from-infer", "mindspore-to-hf", found["infer fused"])
    found["from w8a8-mindspore"] = by("from-golden", "mindspore-to-hf", found["w8a8-mindspore fused"])
    found["from train"] = by("from-train", "train-to-infer", found["train"], drop_mtp=True)
    found["from mp1"] = by("from-mp1", "demo-to-hf", found["mp1"])
    found["from mp4"] = by("from-mp4", "demo-to-hf", found["mp4"])
    found["from w8a8-ct"] = by("from-ct", "dequantize", found["w8a8-ct"])
    return found


@pytest.fixture
def copy(made, tmp_path):
    """A copy of one of them, to be damaged."""

    def copied(name: str = "bf16") -> Path:
        return Path(shutil.copytree(made[name], tmp_path / "copy"))

    return copied


def look(directory: Path, samples: int = 0, **options: object) -> Verdict:
    return verify(directory, Options(samples=samples, **options), lambda *_: None)


def findings(directory: Path, **options: object) -> list[str]:
    return [str(finding) for finding in look(directory, **options).findings]


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    """dtype, begin and end in the file of every tensor."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__")
    return {name: (value["dtype"], *(start + at for at in value["data_offsets"])) for name, value in header.items()}


def file_of(directory: Path, name: str) -> Path:
    return next(path for path in sorted(directory.glob("*.safetensors")) if name in places(path))


def edit_manifest(directory: Path, change) -> None:
    path = directory / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def overwrite(path: Path, name: str, data: np.ndarray) -> None:
    """Put other bytes into a tensor, and make the manifest agree with them."""
    replace(path, name, data)
    _, begin, end = places(path)[name]
    assert end - begin == data.nbytes
    crc = f"{zlib.crc32(data.tobytes()):08x}"
    edit_manifest(path.parent, lambda content: content["files"][path.name]["crc32"].update({name: crc}))


def replace(path: Path, name: str, data: np.ndarray) -> None:
    """Put other bytes at the beginning of a tensor."""
    _, begin, _ = places(path)[name]
    raw = bytearray(path.read_bytes())
    raw[begin : begin + data.nbytes] = data.tobytes()
    path.write_bytes(raw)


# What is sound ------------------------------------------------------------------------------------------------------


def test_every_conversion_is_sound_and_every_tensor_can_be_made_again(made):
    for name, directory in made.items():
        verdict = look(directory, samples=ALL)
        assert verdict.is_sound, (name, verdict.findings[:3])
        assert verdict.notes == [], name
        assert verdict.recomputed == verdict.tensors > 0, name


@pytest.mark.parametrize("name", SPECS)
def test_odd_sizes_and_every_corner_of_the_family(tmp_path, name):
    source = write_random(tmp_path / "source", SPECS[name])
    fused = convert("hf-to-mindspore", source, tmp_path / "fused", qkv_concat=True, ffn_concat=True)
    trained = convert("hf-to-mindspore", source, tmp_path / "train", layout="train")
    for directory in (fused, trained, convert("train-to-infer", trained, tmp_path / "served")):
        verdict = look(directory, samples=ALL)
        assert verdict.is_sound, verdict.findings[:3]
        assert verdict.recomputed == verdict.tensors


@pytest.mark.parametrize("form", encoders.FORMATS)
def test_the_slow_path_reads_every_format(tmp_path, form):
    spec = dataclasses.replace(encoders.SPEC, num_nextn_predict_layers=0)
    tensors, values = encoders.encode_model(spec, encoders.FORMATS[form])
    directory = encoders.write(tmp_path / "source", tensors, encoders.FORMATS[form].config)
    source = open_huggingface(directory, Conversion(), Allowances())
    for param in parameters(spec):
        stored, rows = source.weights.stored(param.name), param.shape[0]
        columns = param.shape[1] if len(param.shape) == 2 else 1
        for window in (((0, rows), (0, columns)), ((rows // 3, rows // 3 + 1), (columns // 2, columns))):
            found = slow_formats.window(source.checkpoint, stored, *window)
            expected = values[param.name].reshape(rows, columns)[slice(*window[0]), slice(*window[1])]
            assert np.array_equal(found, expected), param.name
    source.checkpoint.close()


def test_a_sample_is_as_large_as_asked_for_and_depends_on_its_seed(copy):
    directory = copy()
    overwrite(file_of(directory, EXPERT), EXPERT, np.zeros(EXPERT_SIZE, np.uint16))
    found = [bool([f for f in look(directory, 90, seed=seed).findings if "source" in f.what]) for seed in range(8)]
    assert look(directory, 90).recomputed == 90
    assert True in found and False in found


def test_without_a_manifest_only_structure_and_values_are_checked():
    verdict = look(DEMO)
    assert verdict.is_sound and verdict.kind is None
    assert verdict.notes == [f"no {MANIFEST_FILE}: nothing to compare the bytes with"]
    with pytest.raises(InputError, match=f"no {MANIFEST_FILE}"):
        look(DEMO, source=DEMO)


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("bf16", {"BF16", "F32"}),
        ("mp1", {"BF16", "F32", "F8_E4M3"}),
        ("infer fp16", {"F16", "F32"}),
        ("w8a8-ascend", {"I8", "BF16", "F32"}),
    ],
)
def test_one_flipped_bit_of_any_dtype_is_found(copy, name, dtypes):
    directory, rng = copy(name), np.random.default_rng(1)
    seen = set()
    for path in directory.glob("*.safetensors"):
        for tensor, (dtype, begin, end) in places(path).items():
            if dtype in seen:
                continue
            seen.add(dtype)
            bit = int(rng.integers(8 * begin, 8 * end))
            flip(path, bit)
            found = look(directory).findings
            assert any((f.file, f.tensor) == (path.name, tensor) and "CRC-32" in f.what for f in found), dtype
            assert {f.tensor for f in found} == {tensor}
            flip(path, bit)
    assert seen == dtypes
    assert look(directory).is_sound


@pytest.mark.parametrize("name", ["bf16", "mp1", "train"])
def test_one_flipped_bit_of_a_header_is_found(copy, name):
    directory, rng = copy(name), np.random.default_rng(2)
    path = sorted(directory.glob("*.safetensors"))[-1]
    length = int.from_bytes(path.read_bytes()[:8], "little")
    for bit in [3, 40, 63, 64, *rng.integers(64, 8 * (8 + length), 12).tolist()]:
        flip(path, bit)
        assert any(f.file == path.name for f in look(directory).findings), bit
        flip(path, bit)
    assert look(directory).is_sound


@pytest.mark.parametrize("name", ["bf16", "infer", "w8a8-ascend"])
def test_one_flipped_bit_of_a_small_file_is_found(copy, name):
    directory, rng = copy(name), np.random.default_rng(3)
    small = [path for path in directory.iterdir() if path.suffix != ".safetensors" and path.name != MANIFEST_FILE]
    assert len(small) > 3
    for path in small:
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        assert f"{path.name}: not the bytes that were written" in findings(directory)
        flip(path, bit)
    small[0].unlink()
    assert f"{small[0].name}: missing" in findings(directory)


def test_a_truncated_file(copy):
    directory = copy()
    path = file_of(directory, EXPERT)
    path.write_bytes(path.read_bytes()[:-5])
    found = findings(directory)
    assert any(f.startswith(f"{path.name}: truncated: 5 of ") for f in found)
    assert any(f.startswith(f"{path.name}: ") and "that were written" in f for f in found)


def test_a_file_that_is_gone(copy):
    directory = copy()
    path = file_of(directory, EXPERT)
    count = len(places(path))
    path.unlink()
    found = findings(directory)
    assert f"{path.name}: missing, with {count} tensors" in found
    assert f"{EXPERT}: missing: no file has it" in found


def test_swapped_shards(copy):
    directory = copy()
    first, second, *_ = sorted(directory.glob("*.safetensors"))
    first.rename(directory / "aside")
    second.rename(first)
    (directory / "aside").rename(second)
    found = findings(directory)
    assert f"{first.name}: its header is not the one that was written" in found
    assert f"{second.name}: its header is not the one that was written" in found
    assert any("not in" in f and "as the index says" in f for f in found)


def test_a_file_too_many_and_an_unfinished_conversion(copy):
    directory = copy("infer")
    shutil.copy(directory / "model.safetensors", directory / "extra.safetensors")
    assert "extra.safetensors: not a file of this conversion" in findings(directory)
    (directory / "extra.safetensors").unlink()
    (directory / "conversion.partial.jsonl").write_text("")
    assert "conversion.partial.jsonl: left by an unfinished conversion" in findings(directory)


def test_a_zeroed_tensor_whose_hash_was_made_to_fit(copy):
    directory = copy()
    overwrite(file_of(directory, EXPERT), EXPERT, np.zeros(EXPERT_SIZE, np.uint16))
    place = f"{file_of(directory, EXPERT).name}: {EXPERT}"
    assert findings(directory) == [f"{place}: all zero"]
    again = findings(directory, samples=ALL)
    assert again[0] == f"{place}: all zero"
    assert again[1].startswith(f"{place}: not what the source gives: ") and len(again) == 2


@pytest.mark.parametrize("name", ["infer fused", "mp4", "w8a8-ct", "w8a8-mindspore fused", "fp8", "from mp1"])
def test_values_that_are_wrong_everywhere_are_found_in_a_sample(copy, name):
    """One low bit of every element of one tensor: plausible values, and the manifest agrees with them."""
    directory = copy(name)
    path = sorted(directory.glob("*.safetensors"))[-1]
    tensor, (dtype, begin, end) = max(places(path).items(), key=lambda item: item[1][2] - item[1][1])
    width = 1 if "8" in dtype else 2
    bits = np.frombuffer(path.read_bytes()[begin:end], f"u{width}") ^ 1
    overwrite(path, tensor, bits)
    found = look(directory, samples=ALL).findings
    assert [(f.file, f.tensor) for f in found] == [(path.name, tensor)]
    assert found[0].what.startswith("not what the source gives")


@pytest.mark.parametrize(
    ("kind", "reader", "options"),
    [
        ("fp8-to-bf16", FastWeights, {}),
        ("hf-to-mindspore", FastWeights, {}),
        ("quantize", FastWeights, {"format": "w8a8-ct"}),
        ("mindspore-to-hf", LayoutWeights, {}),
    ],
)
def test_a_fault_of_the_code_that_converts_is_found(tmp_path, made, monkeypatch, kind, reader, options):
    """Weights are read wrongly, and the checksums are those of what was made of them."""
    right = reader.read
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read", lambda *arguments: right(*arguments)[::-1].copy())
        source = made["train"] if kind == "mindspore-to-hf" else DEMO
        directory = convert(kind, source, tmp_path / "out", **options)
    assert look(directory).is_sound
    assert len(look(directory, samples=ALL).findings) > look(directory).tensors / 4


# Manifest -----------------------------------------------------------------------------------------------------------


def test_a_manifest_that_was_tampered_with(copy):
    directory = copy()
    path = file_of(directory, EXPERT)
    original = (directory / MANIFEST_FILE).read_bytes()

    def found_after(change) -> list[str]:
        edit_manifest(directory, change)
        found = findings(directory)
        (directory / MANIFEST_FILE).write_bytes(original)
        return found

    def entry(content: dict) -> dict:
        return content["files"][path.name]

    found = found_after(lambda content: entry(content)["crc32"].update({EXPERT: "00000000"}))
    assert len(found) == 1 and found[0].startswith(f"{path.name}: {EXPERT}: not the bytes that were written")
    found = found_after(lambda content: entry(content)["crc32"].pop(EXPERT))
    assert found == [f"{path.name}: {EXPERT}: not a tensor of this conversion"]
    found = found_after(lambda content: entry(content)["crc32"].update({"x.weight": "00000000"}))
    assert found == [f"{path.name}: x.weight: missing"]
    found = found_after(lambda content: content["files"].pop(path.name))
    assert f"{path.name}: not a file of this conversion" in found
    assert f"{MANIFEST_FILE}: its files are not those that it was made for" in found
    for change in (
        lambda content: content.update(files=[]),
        lambda content: content["files"].update({"../x": entry(content)}),
        lambda content: content.pop("kind"),
        lambda content: entry(content).update(crc32={EXPERT: 5}),
        lambda content: content.update(small_files={"config.json": None}),
    ):
        found = found_after(change)
        assert len(found) == 1 and found[0].startswith(f"{MANIFEST_FILE}: not a manifest of a conversion: ")
    (directory / MANIFEST_FILE).write_bytes(original[:-100])
    assert findings(directory)[0].startswith(f"{MANIFEST_FILE}: invalid JSON")


def test_a_conversion_with_other_options_than_its_manifest_says(copy):
    directory = copy()
    edit_manifest(directory, lambda content: content["options"].update(drop_mtp=True))
    found = findings(directory, samples=1)
    assert found == [f"{MANIFEST_FILE}: its tensors are not those that the source is converted to"]


# Source -------------------------------------------------------------------------------------------------------------


def test_the_source_is_found_where_it_was_or_where_it_is_said_to_be(tmp_path):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    directory = convert("fp8-to-bf16", source, tmp_path / "out")
    assert look(directory, samples=5).source == source
    source.rename(tmp_path / "moved")
    verdict = look(directory, samples=5)
    assert (verdict.source, verdict.recomputed, verdict.is_sound) == (None, 0, True)
    assert verdict.notes == [f"no values were made again: the source {source} is gone; give --source"]
    assert look(directory, samples=5, source=tmp_path / "moved").recomputed == 5
    assert look(directory, samples=5, source=DEMO).recomputed == 5, "a copy of the source is as good"


def test_another_source_is_refused(tmp_path):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    directory = convert("fp8-to-bf16", source, tmp_path / "out")
    shards.edit(source, NORM, lambda tensors: tensors.update({"x": ("F32", [1], b"1234")}))
    verdict = look(directory, samples=5)
    assert verdict.recomputed == 0 and verdict.is_sound
    assert len(verdict.notes) == 1 and verdict.notes[0].startswith("no values were made again: ")
    with pytest.raises(InputError):
        look(directory, samples=5, source=source)
    other = write_random(tmp_path / "other", SPECS["v3"])
    with pytest.raises(InputError, match="not the source of this conversion"):
        look(directory, samples=5, source=other)


def test_a_source_whose_values_changed_is_told_from_its_result(tmp_path):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    directory = convert("hf-to-mindspore", source, tmp_path / "out")
    assert look(directory, samples=ALL).is_sound
    path = file_of(source, NORM)
    _, begin, end = places(path)[NORM]
    replace(path, NORM, np.frombuffer(path.read_bytes()[begin:end], np.uint16) ^ 1)
    assert [f.tensor for f in look(directory, samples=ALL).findings] == ["model.layers.1.attention_norm.weight"]


def test_a_model_by_name_for_layouts_without_a_config(tmp_path, made):
    bare = Path(shutil.copytree(made["train"], tmp_path / "bare"))
    (bare / "config.json").unlink()
    (bare / MANIFEST_FILE).unlink()
    config = str(made["train"] / "config.json")
    assert look(bare, config=config).is_sound
    served = convert("train-to-infer", bare, tmp_path / "served", config=config)
    assert look(served, samples=ALL).recomputed == look(served).tensors
    assert not look(bare).is_sound


# Structure of directories that nobody wrote a manifest for ----------------------------------------------------------


@pytest.mark.parametrize("name", ["infer", "train", "w8a8-mindspore", "mp4"])
def test_structure_of_other_layouts(copy, name):
    directory = copy(name)
    (directory / MANIFEST_FILE).unlink()
    assert findings(directory) == []
    path = max(directory.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    tensors = shards.read(path)
    lost, (dtype, shape, data) = next((key, value) for key, value in tensors.items() if len(value[1]) == 2)
    shards.write(path, {**tensors, lost: (dtype, [shape[0] // 2, shape[1] * 2], data)})
    found = findings(directory)
    assert len(found) == 1 and lost in found[0]
    shards.write(path, {key: value for key, value in tensors.items() if key != lost})
    assert any("missing" in each for each in findings(directory))


def test_quantised_modules_without_their_scales(copy):
    directory = copy("w8a8-mindspore")
    (directory / MANIFEST_FILE).unlink()
    name_map = directory / "param_name_map.json"
    module = "model.layers.1.attention.q2l_proj."
    path = file_of(directory, f"{module}_layer.weight")
    tensors = shards.read(path)
    del tensors[f"{module}_layer.matmul.weight_scale"]
    shards.write(path, tensors)
    listed = json.loads(name_map.read_text())
    del listed[f"{module}_layer.matmul.weight_scale"]
    name_map.write_text(json.dumps(listed))
    assert findings(directory) == [f"{path.name}: {module}_layer.weight has no {module}_layer.matmul.weight_scale"]


# Degenerate values --------------------------------------------------------------------------------------------------

SCALE = "model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv"
CODES = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "dtype", "values", "fault"),
    [
        (NORM, "BF16", np.array([0x7FC0, 0xFF81], np.uint16), "2 NaN"),
        (NORM, "BF16", np.array([0xFF80], np.uint16), "1 infinite"),
        (BIAS, "F32", np.array([np.inf, -np.inf, np.nan], np.float32), "1 NaN"),
        (CODES, "F8_E4M3", np.array([0x7F, 0xFF, 0x7E], np.uint8), "2 NaN"),
        (SCALE, "F32", np.array([0], np.float32), "1 scales that are not positive"),
        (SCALE, "F32", np.array([-1e-3], np.float32), "1 scales that are not positive"),
        (SCALE, "F32", np.array([np.nan], np.float32), "1 NaN"),
    ],
)
def test_values_that_no_sound_checkpoint_holds(tmp_path, name, dtype, values, fault):
    directory = Path(shutil.copytree(DEMO, tmp_path / "copy"))
    path = file_of(directory, name)
    assert places(path)[name][0] == dtype
    replace(path, name, values)
    found = findings(directory)
    assert found[0] == f"{path.name}: {name}: {fault}"
    assert all(each.startswith(f"{path.name}: {name}: ") for each in found)


def test_what_may_be_zero_and_what_may_not(tmp_path):
    directory = Path(shutil.copytree(DEMO, tmp_path / "copy"))

    def clear(name: str) -> None:
        def change(tensors: shards.Tensors) -> None:
            dtype, shape, data = tensors[name]
            negative = {"BF16": b"\0\x80", "F8_E4M3": b"\x80", "F32": b"\0\0\0\x80"}[dtype]
            tensors[name] = dtype, shape, negative * (len(data) // len(negative))

        shards.edit(directory, name, change)

    clear(BIAS)
    assert findings(directory) == [], "a router's bias starts as zero"
    for name in (NORM, CODES, "lm_head.weight"):
        clear(name)
    assert {(f.tensor, f.what) for f in look(directory).findings} == {
        (name, "all zero") for name in (NORM, CODES, "lm_head.weight")
    }


def test_offsets_of_symmetric_weights_are_zero_and_sound(made):
    path = next(made["w8a8-ascend"].glob("*.safetensors"))
    offsets = [value for name, value in shards.read(path).items() if name.endswith("weight_offset")]
    assert len(offsets) > 100 and not any(any(data) for _, _, data in offsets)
    assert look(made["w8a8-ascend"]).is_sound


def test_small_pieces_see_the_same(made, monkeypatch, copy):
    monkeypatch.setattr("deepspan.convert.verify.contents._PIECE_BYTES", 4096)
    assert look(made["mp1"], workers=5).is_sound
    directory = copy()
    path = file_of(directory, EXPERT)
    flip(path, 8 * places(path)[EXPERT][2] - 1)
    assert [f.tensor for f in look(directory).findings] == [EXPERT]


def test_a_file_that_shrinks_while_it_is_read(copy, monkeypatch):
    directory = copy()
    path = file_of(directory, EXPERT)
    begin = places(path)[EXPERT][1]
    from deepspan.convert.verify import directory as module

    def cut(*arguments):
        path.write_bytes(path.read_bytes()[: begin + 10])
        return original(*arguments)

    original = module.check_contents
    monkeypatch.setattr(module, "check_contents", cut)
    found = findings(directory)
    assert f"{path.name}: {EXPERT}: the file became shorter while it was read" in found


def test_manifests_are_the_same_wherever_they_are_written(tmp_path):
    contents = [(convert("fp8-to-bf16", DEMO, tmp_path / name) / MANIFEST_FILE).read_bytes() for name in ("a", "b/c")]
    assert contents[0] == contents[1]
    content = json.loads(contents[0])
    text = "".join(f"{name}\n{entry['header_sha256']}\n" for name, entry in content["files"].items())
    assert content["structure"] == hashlib.sha256(text.encode()).hexdigest()
    assert Path(content["source_directory"]) == DEMO
