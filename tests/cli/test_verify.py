"""deepspan verify, as users type it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli import shards
from tests.cli.conftest import DEMO


@pytest.fixture
def converted(deepspan, tmp_path) -> Path:
    assert deepspan("convert", "hf-to-mindspore", DEMO, tmp_path / "ms").code == 0
    return tmp_path / "ms"


def test_a_sound_conversion(deepspan, converted):
    result = deepspan("verify", converted)
    assert (result.code, result.err) == (0, "")
    assert "layout       mindspore_infer" in result.out
    assert "94 tensors in 18 files" in result.out and ", compared with the manifest" in result.out
    assert f"made again   rows of 64 tensors, from {DEMO} by hf-to-mindspore" in result.out
    assert "damage       none" in result.out
    result = deepspan("verify", converted, "--json", "--samples", "3", "--seed", "5")
    report = json.loads(result.out)
    assert result.code == 0
    assert report["sound"] is True and report["findings"] == report["notes"] == []
    assert (report["recomputed"], report["conversion"], report["tensors"]) == (3, "hf-to-mindspore", 94)


def test_damage_is_listed_and_ends_with_1(deepspan, converted):
    path = converted / "model_layer_1.safetensors"
    tensors = shards.read(path)
    name = "model.layers.1.attention.wo.weight"
    data = tensors[name][2]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(data, bytes([data[0] ^ 1]) + data[1:]))
    result = deepspan("verify", converted, "--samples", "0")
    assert result.code == 1
    assert result.err == f"error: damaged: 1 finding: {converted}: replace the files that are named\n"
    assert f"    {path.name}: {name}: not the bytes that were written: CRC-32 " in result.out
    result = deepspan("verify", converted, "--json")
    findings = json.loads(result.out)["findings"]
    assert result.code == 1 and {(f["file"], f["tensor"]) for f in findings} == {(path.name, name)}


def test_many_findings_are_shortened(deepspan, checkpoint):
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    result = deepspan("verify", checkpoint)
    assert result.code == 1
    assert result.out.rstrip().endswith("more (--json lists all)") and result.out.count("\n") < 70


def test_a_directory_of_somebody_else(deepspan):
    result = deepspan("verify", DEMO)
    assert (result.code, result.err) == (0, "")
    assert "note         no conversion-manifest.json: nothing to compare the bytes with" in result.out


def test_against_another_layout(deepspan, converted):
    result = deepspan("verify", DEMO, "--against", converted)
    assert (result.code, result.err) == (0, "")
    assert f"{DEMO} (huggingface)" in result.out and f"{converted} (mindspore_infer)" in result.out
    assert "identical    269 parameters" in result.out and "differing    0 parameters\n" in result.out
    report = json.loads(deepspan("verify", converted, "--against", DEMO, "--json").out)
    assert report["equal"] is True and report["identical"] == 269
    assert report["differing"] == report["missing"] == report["extra"] == []


def test_against_what_differs(deepspan, tmp_path):
    assert deepspan("convert", "quantize", DEMO, tmp_path / "int8", "--format", "w8a8-ct", "--drop-mtp").code == 0
    result = deepspan("verify", DEMO, "--against", tmp_path / "int8")
    assert result.code == 1 and result.err.startswith("error: the checkpoints differ: ")
    assert ": differs, max error 0.0" in result.out and "    model.layers.4.enorm.weight\n" in result.out
    report = json.loads(deepspan("verify", DEMO, "--against", tmp_path / "int8", "--json", "--rtol", "0.01").out)
    assert report["equal"] is False and report["missing"] and not report["differing"]
    assert all(0 < each["relative_error"] <= 0.01 for each in report["within"])
    result = deepspan("verify", DEMO, "--against", tmp_path / "int8", "--rtol", "0.01", "--drop-mtp")
    count = len(report["within"])
    assert result.code == 0 and f"within       0.01: {count} parameters, relative error up to 0.008" in result.out
    assert count > 100 and "differing    0 parameters\n" in result.out


def test_a_side_without_a_config(deepspan, converted, tmp_path):
    (converted / "config.json").unlink()
    result = deepspan("verify", converted, "--against", DEMO)
    assert result.code == 0, "the other one's serves"
    assert deepspan("verify", converted, "--config", DEMO / "config.json").code == 1, "it was written and is gone"
    (converted / "conversion-manifest.json").unlink()
    assert deepspan("verify", converted, "--config", DEMO / "config.json").code == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--rtol", "0.1"], "--rtol does not go without --against"),
        (["--drop-mtp"], "--drop-mtp does not go without --against"),
        (["--against", DEMO, "--source", DEMO], "--source does not go with --against"),
        (["--config", DEMO / "config.json"], "the checkpoint has a config.json: --config"),
        (["--against", DEMO, "--rtol", "-1"], "rtol is -1.0"),
        (["--against", DEMO, "--rtol", "nan"], "rtol is nan"),
        (["--samples", "-1"], "samples is -1"),
        (["--workers", "0"], "workers is 0"),
        (["--source", DEMO], "no conversion-manifest.json"),
        (["--against", "nowhere"], "not a directory: nowhere"),
    ],
)
def test_bad_usage(deepspan, arguments, what):
    result = deepspan("verify", DEMO, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {what}") and result.err.count("\n") == 1


def test_what_is_no_checkpoint(deepspan, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        result = deepspan("verify", path)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    copy = Path(shutil.copytree(DEMO, tmp_path / "copy"))
    for path in copy.glob("*.safetensors"):
        path.unlink()
    assert deepspan("verify", copy).code == 2
