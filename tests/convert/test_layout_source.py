"""MindSpore directories as the source of a run: the same parameters, the same answer."""

import shutil

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.layout_source import LayoutSource, is_mindspore
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.scripts.cli import main
from tests.convert.checkpoints import DEMO, convert

LAYOUTS = {
    "infer": {},
    "fused": {"qkv_concat": True, "ffn_concat": True, "mtp_names": True},
    "train": {"layout": "train"},
    "train-grouped": {"layout": "train-grouped"},
}


@pytest.fixture(scope="module")
def original():
    with Checkpoint.open(DEMO) as checkpoint:
        yield CheckpointWeights(checkpoint, spec_from_hf(checkpoint.config, "config.json"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {name: convert("hf-to-mindspore", DEMO, folder / name, **options) for name, options in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_source(original, converted, layout):
    with Checkpoint.open(converted[layout]) as checkpoint:
        assert is_mindspore(checkpoint)
    source = LayoutSource(converted[layout])
    names = source.names()
    assert source.has_mtp == any(name.startswith("model.layers.3.") for name in names)
    assert set(names) <= set(original.names())
    for name in names:
        np.testing.assert_array_equal(source.read(name, "bf16"), original.read(name, "bf16"), err_msg=name)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    piece = source.read(name, "bf16", (8, 40), (3, 20))
    np.testing.assert_array_equal(piece, original.read(name, "bf16", (8, 40), (3, 20)))
    source.close()


def test_hugging_face_directories_are_not_mistaken():
    with Checkpoint.open(DEMO) as checkpoint:
        assert not is_mindspore(checkpoint)


@pytest.mark.parametrize("layout", ["infer", "fused", "train-grouped"])
def test_it_answers_as_the_checkpoint_it_was_made_from(converted, capsys, layout):
    assert main(["generate", str(converted[layout]), "--prompt", "What is 17 + 25?"]) == 0
    assert "42" in capsys.readouterr().out


def test_a_directory_without_config_takes_the_spec_of_the_run(converted, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in converted["infer"].iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (bare / file.name).hardlink_to(file)
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{path: {bare}, spec: demo}}\nbackend: reference\nsampling: {{temperature: 0}}\n")
    assert main(["generate", str(run), "--prompt", "What is 17 + 25?"]) == 0
    assert "42" in capsys.readouterr().out


def test_a_tensor_that_is_missing_stops_the_load(converted, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted["infer"], broken)
    next(path for path in broken.glob("*.safetensors") if "1" in path.name).unlink()
    with pytest.raises(InputError):
        LayoutSource(broken)
