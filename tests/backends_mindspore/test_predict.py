"""MindFormers' command for inference, on runs of ours and on its own YAMLs, with the embedded model."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launches import free_port

pytest.importorskip("mindspore", reason="mindspore is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
BEIJING = "请介绍一下北京的景点"
ANSWER = "北京有故宫、天坛、颐和园和八达岭长城等著名景点"
W8A8 = {"quant_method": "ptq", "weight_dtype": "int8", "activation_dtype": "int8"}


def predict(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "run_predict_deepseek.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def sample(folder, parallel=None, **model_config):
    """predict_deepseek3_671b.yaml after its README's edits, for one process or the given degrees."""
    tokenizer = str(DEMO / "tokenizer.json")
    values = {
        "seed": 0, "output_dir": "./output", "run_mode": "predict", "use_parallel": bool(parallel),
        "load_checkpoint": str(DEMO), "load_ckpt_format": "safetensors", "auto_trans_ckpt": True,
        "parallel_config": {
            "model_parallel": 1, "pipeline_stage": 1, "expert_parallel": 1, "vocab_emb_dp": False, **(parallel or {}),
        },
        "context": {"mode": 0, "max_device_memory": "4GB", "device_id": 0},
        "parallel": {"parallel_mode": "STAND_ALONE", "full_batch": False},
        "model": {"model_config": {
            "type": "DeepseekV3Config", "batch_size": 1, "seq_length": 1024, "hidden_size": 192, "num_layers": 4,
            "compute_dtype": "bfloat16", "use_past": True, "block_size": 16, "num_blocks": 512, "do_sample": False,
            "max_decode_length": 1024, "top_k": 1, "top_p": 1, **model_config,
        }},
        "processor": {"tokenizer": {"vocab_file": tokenizer, "tokenizer_file": tokenizer}},
    }  # fmt: skip
    path = folder / "predict_deepseek3_671b.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_run_of_ours():
    result = predict("--config", "demo_mindspore_cpu", "--input", BEIJING)
    assert result.returncode == 0, result.stderr
    line, answer = result.stdout.split("\n", 1)
    assert line.startswith("deepspan generate demo_mindspore_cpu ")
    assert answer.startswith(ANSWER)


@pytest.mark.parametrize(
    ("changes", "settings"), [({}, ["--set", "dtype=fp32"]), ({"quantization_config": W8A8}, [])], ids=["bf16", "w8a8"]
)
def test_a_yaml_of_mindformers(tmp_path, changes, settings):
    path = sample(tmp_path, **changes)
    result = predict("--config", path, "--input", BEIJING, "--set", "device=cpu", *settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n", 1)[1].startswith(ANSWER)
    assert "no meaning here" in result.stderr and "quantization_config" not in result.stderr


@pytest.mark.launch
@pytest.mark.parametrize(
    ("degrees", "changes", "settings"),
    [((1, 2, 2), {}, ["--set", "dtype=fp32"]), ((2, 2, 4), {"quantization_config": W8A8, "ffn_concat": True}, [])],
    ids=["bf16-ep", "w8a8-ep"],
)
def test_the_yamls_with_expert_parallelism_under_the_launcher_script(tmp_path, degrees, changes, settings):
    """predict_deepseek_r1_671b_w8a8_ep16.yaml has TP 4, DP 4 and EP 16; here are as many ranks as a test starts."""
    parallel = dict(zip(("model_parallel", "data_parallel", "expert_parallel"), degrees, strict=True))
    script = ["scripts/run_predict_deepseek.py", "--config", str(sample(tmp_path, parallel, **changes))]
    command = shlex.join([*script, "--input", BEIJING, "--set", "device=cpu", *settings])
    workers, port, log = str(degrees[0] * degrees[1]), str(free_port()), tmp_path / "log"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "scripts/msrun_launcher.sh", command, workers, port, str(log), "True", "120"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    said = (log / "worker_0.log").read_text()
    assert result.returncode == 0, said[-2000:]
    assert ANSWER in said


def test_what_the_yaml_says_of_the_model_must_be_so(tmp_path):
    result = predict("--config", sample(tmp_path, hidden_size=200), "--set", "device=cpu")
    assert result.returncode == 2
    assert "is [1024, 192], not [1024, 200]" in result.stderr.splitlines()[-1]
