"""W8A8 with static activation scales in attention: calibrated, converted, computed by the format's own definition."""

import json
from pathlib import Path

import numpy as np
import pytest

from deepspan.backends.base import stored_as
from deepspan.configs.schema import RunConfig
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.layout_source import LayoutSource
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.holding import stored_dtype
from deepspan.models.quantise import quantise_activation_int8, quantise_int8_channels
from deepspan.models.reference import GrowingCache, ReferenceModel
from deepspan.scripts import cli
from deepspan.scripts.runtime import open_run, read_run
from deepspan.serving.batch import complete
from tests.launches import free_port, launch, token_ids

pytest.importorskip("mindspore", reason="mindspore is not installed")

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
TOKENS = np.random.default_rng(1).integers(5, 1000, 40).astype(np.int32)
STATIC = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")
PROMPT = "请介绍一下北京的景点"


class Product:
    """A matrix of the reference model whose products are computed by ``multiply``; ``x @ matrix.T`` is all it can."""

    __array_ufunc__ = None  # numpy's arrays leave the product to this class

    def __init__(self, multiply):
        self.multiply = multiply

    @property
    def T(self):
        return self

    def __rmatmul__(self, x):
        return self.multiply(x)


def reference_logits(directory, product):
    """Of the checkpoint's BF16 meaning, but for linear layers that ``product(name, weights)`` makes."""
    with Checkpoint.open(directory) as checkpoint:
        spec = spec_from_hf(checkpoint.config, str(directory))
        weights = CheckpointWeights(checkpoint, spec)
        values = {name: weights.read(name, "f32") for name in weights.names()}
        values |= {name: made for name in values if (made := product(name, weights)) is not None}
        model = ReferenceModel(spec, values, 64, form="naive")
        return model.logits(model.hidden(TOKENS, [GrowingCache()], [len(TOKENS)]))


def calibrated(ranges):
    """A calibration file's values: each module's range onto -128..127."""
    found = {}
    for module, (low, high) in ranges.items():
        scale = (high - low) / 255
        found |= {f"{module}.input_scale": scale, f"{module}.input_offset": round(-128 - low / scale)}
    return found


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    ranges = {}

    def record(name, weights):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in STATIC:
            return None
        weight_NK = weights.read(name, "f32")

        def multiply(x):
            low, high = ranges.get(module, (0.0, 0.0))
            ranges[module] = min(low, float(x.min())), max(high, float(x.max()))
            return x @ weight_NK.T

        return Product(multiply)

    reference_logits(DEMO, record)
    path = tmp_path_factory.mktemp("calibration") / "scales.json"
    path.write_text(json.dumps(calibrated(ranges)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(calibration, tmp_path_factory):
    """Directories by format, made once."""
    made = {}

    def convert(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form) / "checkpoint"
            arguments = ["quantize", str(DEMO), str(made[form]), "--format", form, "--calibration", str(calibration)]
            assert cli.main(["convert", *arguments]) == 0
        return made[form]

    return convert


def by_definition(name, weights):
    """Static: (x_q q^T + quant_bias) deq_scale, as the files say it; other INT8 modules: each token for itself."""
    stored = weights.stored(name)
    if stored.format != "int8_channel" or name.endswith("kv_b_proj.weight"):
        return None
    parts = weights.parts(name)
    codes_NK = parts["weight"].view(np.int8).astype(np.float64)

    def dynamic(x):
        codes, scales = quantise_activation_int8(x)
        return ((codes @ codes_NK.T) * scales * parts["weight_scale"].reshape(-1)).astype(np.float32)

    def static(x):
        scale, offset = parts["input_scale"].reshape(-1)[0], parts["input_offset"].reshape(-1)[0]
        codes = np.clip(np.round(x / scale + offset), -128, 127).astype(np.float64)
        return ((codes @ codes_NK.T + parts["quant_bias"]) * parts["deq_scale"].reshape(-1)).astype(np.float32)

    return Product(static if "quant_bias" in parts else dynamic)


def write_run(folder, directory, extra=""):
    path = folder / "run.yaml"
    path.write_text(
        f"""
model: {{path: {directory}, tokenizer: {DEMO}}}
backend: mindspore_ascend
device: cpu
dtype: w8a8
engine: {{max_batch: 2, max_seq_len: 256}}
sampling: {{temperature: 0}}
{extra}
"""
    )
    return path


def relative_norm(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def logits(path):
    with open_run(read_run(str(path))) as session:
        return session.logits(TOKENS.tolist())


def test_ascend_s_files_are_computed_as_they_define(converted, tmp_path):
    directory = converted("w8a8-ascend")
    wanted = reference_logits(directory, by_definition)
    got = logits(write_run(tmp_path, directory))
    assert relative_norm(got, wanted) < 2e-3  # codes at a half may round either way
    assert relative_norm(got, reference_logits(directory, lambda name, weights: None)) > 5e-3, "inputs are quantised"


def test_golden_stick_s_files_hold_the_same_mappings_and_weights(converted):
    """Its scales are BF16, so that codes differ by one here and there."""
    source = LayoutSource(converted("w8a8-mindspore"))
    with Checkpoint.open(converted("w8a8-ascend")) as checkpoint:
        weights = CheckpointWeights(checkpoint, spec_from_hf(checkpoint.config, "ascend"))
        for name in (name for name in weights.names() if weights.format(name) == "int8_channel"):
            codes_NK, _ = quantise_int8_channels(source.read(name, "f32"))
            assert np.abs(codes_NK.astype(int) - weights.int8_channels(name)[0]).max() <= 1
            mapping, wanted = source.static_input(name), weights.static_input(name)
            is_static = name.split(".")[-2] in STATIC and ".layers.4." not in name  # MTP's was not calibrated
            assert (mapping is not None) == (wanted is not None) == is_static
            assert mapping is None or mapping == (pytest.approx(wanted[0], rel=2**-8), wanted[1], None)
    source.close()


def test_auto_follows_w8a8_on_an_npu_only(converted):
    from deepspan.backends.mindspore_ascend.device import ASCEND, CPU, choose_dtype

    source = LayoutSource(converted("w8a8-mindspore"))
    with Checkpoint.open(DEMO) as checkpoint:
        spec = spec_from_hf(checkpoint.config, "config.json")
    run, plain = (RunConfig.model_validate({"model": {"spec": "demo"}, "dtype": dtype}) for dtype in ("auto", "bf16"))
    stored = stored_dtype(spec, stored_as(run, source))
    source.close()
    assert [choose_dtype(run, device, stored) for device in (ASCEND, CPU)] == ["w8a8", "fp32"]
    assert choose_dtype(run, ASCEND, "int4") == choose_dtype(plain, ASCEND, stored) == "bf16"


def answer(path):
    with open_run(read_run(str(path))) as session:
        prompt = session.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
        [completion] = complete(session.engine, [prompt], session.generation_options())
        return completion.token_ids


def test_golden_stick_s_files_answer_as_ascend_s(converted, tmp_path):
    found = [answer(write_run(tmp_path, converted(form))) for form in ("w8a8-mindspore", "w8a8-ascend")]
    assert found[0] == found[1] and len(found[0]) > 10


@pytest.mark.launch
def test_the_bias_is_added_once_over_the_ranks(converted, tmp_path):
    single = answer(write_run(tmp_path, converted("w8a8-ascend")))
    log = tmp_path / "log"
    parallel = f"""
parallel: {{tp: 2}}
launch: {{launcher: msrun, procs_per_node: 2, master_port: {free_port()}, log_dir: {log}}}
"""
    job = launch(write_run(tmp_path, converted("w8a8-ascend"), parallel), "generate", "--json", f"--prompt={PROMPT}")
    output, messages = job.communicate(timeout=300)
    assert job.returncode == 0, messages
    assert token_ids(output) == [single]
