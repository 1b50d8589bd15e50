"""``deepspan convert`` and the commands of the original projects, as users type them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepspan.models.params import parameters
from deepspan.scripts.cli import main
from deepspan.scripts.commands.convert import parse_size
from tests.convert import encoders
from tests.convert.checkpoints import DEMO, ROOT, assert_same_tensors, convert, files, hf_config, stored, write_random
from tests.specs import SPECS, make


@pytest.fixture
def deepspan(capsys):
    """Run one command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script of the checkout, run as a user of the original project would."""
    command = [sys.executable, ROOT / "scripts" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_convert_says_what_it_did(deepspan, tmp_path):
    out = tmp_path / "out"
    code, text, errors = deepspan("convert", "fp8-to-bf16", DEMO, out, "--workers", 2, "--drop-mtp")
    assert (code, errors) == (0, "")
    assert "tensors in 3 files" in text or "tensors in 2 files" in text
    assert "by drop-mtp" in text
    assert_same_tensors(stored(out), stored(convert("fp8-to-bf16", DEMO, tmp_path / "direct", drop_mtp=True)))
    code, text, _ = deepspan("convert", "fp8-to-bf16", DEMO, out, "--drop-mtp")
    assert (code, text.split()[0]) == (0, "complete")


def test_dry_run_prints_the_plan_and_writes_nothing(deepspan, tmp_path):
    arguments = ("convert", "hf-to-mindspore", DEMO, tmp_path / "out", "--layout", "train-grouped", "--workers", 3)
    before = files(DEMO)
    code, text, _ = deepspan(*arguments, "--dry-run")
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert files(DEMO) == before
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines.keys() >= {"kind", "read", "write", "dropped", "free", "peak", "time"}
    assert "2 tensors by mtp-copy" in lines["dropped"]
    assert "3 workers" in lines["peak"]
    assert "reads" in lines["time"] and "GB/s" in lines["time"]
    assert deepspan(*arguments)[0] == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert f"{written:,} bytes of {len(stored(tmp_path / 'out'))} tensors in 5 files" in lines["write"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8-to-bf17", DEMO, "out"), "unknown kind 'fp8-to-bf17': convert: did you mean fp8-to-bf16?"),
        (("fp8-to-bf16", DEMO, "out", "--mp", 2), "--mp is not for fp8-to-bf16: convert: it belongs to hf-to-demo"),
        (("fp8-to-bf16", DEMO, "out", "--shard-size", "5 parsecs"), "'5 parsecs' is no size"),
        (("fp8-to-bf16", DEMO, "out", "--workers", 0), "workers is 0"),
        (("fp8-to-bf16", DEMO, DEMO), "source and destination are the same directory"),
        (("fp8-to-bf16", "nowhere", "out"), "cannot open the checkpoint: nowhere"),
        (("fp8-to-bf16", DEMO, "out", "--allow", "drop=nothing"), "no tensor needs drop=nothing"),
        (("hf-to-demo", DEMO, "out"), "give --mp N"),
    ],
)
def test_bad_usage_is_one_line(deepspan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text, errors = deepspan("convert", *arguments)
    assert (code, text) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("4.3 gb", 4_300_000_000), ("512MiB", 2**29), ("1000", 1000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_notes_go_to_standard_error(deepspan, tmp_path):
    code, text, errors = deepspan("convert", "hf-to-demo", DEMO, tmp_path / "out", "--mp", 4)
    assert code == 0
    assert errors.startswith("note: 4 ranks cut through the scale blocks")
    assert "note" not in text


def test_fp8_cast_bf16_of_both_projects(tmp_path):
    done = script(
        "fp8_cast_bf16.py", "--input-fp8-hf-path", DEMO, "--output-bf16-hf-path", tmp_path / "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"deepspan convert fp8-to-bf16 {DEMO} {tmp_path / 'o'}"
    assert_same_tensors(stored(tmp_path / "o"), stored(convert("fp8-to-bf16", DEMO, tmp_path / "direct")))


def test_convert_of_deepseek(tmp_path):
    flags = ("--hf-ckpt-path", DEMO, "--save-path", tmp_path / "o", "--model-parallel", 4)
    done = script("convert.py", *flags, "--n-experts", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"deepspan convert hf-to-demo {DEMO} {tmp_path / 'o'} --mp 4 --drop-mtp"
    assert (tmp_path / "o" / "model3-mp4.safetensors").exists()
    assert (tmp_path / "o" / "tokenizer.json").exists()
    wrong = script("convert.py", *flags, "--n-experts", 256, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "256 given, and n_routed_experts of the model is 16" in wrong.stderr


@pytest.mark.parametrize(
    ("flags", "line", "options"),
    [
        (("--infer", "True", "--worker_num", 2), "--layout infer --workers 2", {"layout": "infer"}),
        ((), "--layout train-grouped --workers 4", {"layout": "train-grouped"}),
        (("--use_grouped_gemm", "false", "--dtype", "fp32", "--n_head", 8), "--layout train --dtype fp32 --workers 4",
         {"layout": "train", "dtype": "fp32"}),
        (("--infer", "false", "--num_nextn_predict_layers", 0), "--layout train-grouped --drop-mtp --workers 4",
         {"layout": "train-grouped", "drop_mtp": True}),
    ],
)  # fmt: skip
def test_convert_weight_of_mindformers(tmp_path, flags, line, options):
    out = tmp_path / "o"
    done = script("convert_weight.py", "--torch_ckpt_path", DEMO, "--mindspore_ckpt_path", out, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"deepspan convert hf-to-mindspore {DEMO} {out} {line}"
    assert_same_tensors(stored(out), stored(convert("hf-to-mindspore", DEMO, tmp_path / "direct", **options)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n_head", 128), "128 given, and num_attention_heads of the model is 8: --n_head"),
        (("--save_format", "ckpt"), "use safetensors"),
        (("--pre_ckpt_path", "x"), "saves nothing"),
        (("--infer", "maybe"), "neither true nor false"),
    ],
)
def test_convert_weight_refuses_what_it_cannot_mean(tmp_path, flags, message):
    out = tmp_path / "o"
    done = script("convert_weight.py", "--torch_ckpt_path", DEMO, "--mindspore_ckpt_path", out, *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not out.exists()


def test_train_to_infer_of_mindformers(tmp_path):
    trained = convert("hf-to-mindspore", DEMO, tmp_path / "trained", layout="train")
    flags = ("--input_path", trained, "--output_path", tmp_path / "o", "--num_heads", 8, "--processes", 2)
    done = script("deepseek3_train2infer.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"deepspan convert train-to-infer {trained} {tmp_path / 'o'} --workers 2"
    assert_same_tensors(stored(tmp_path / "o"), stored(convert("hf-to-mindspore", DEMO, tmp_path / "direct")))
    (trained / "config.json").unlink()
    without = script("deepseek3_train2infer.py", "--input_path", trained, "--output_path", "p", cwd=tmp_path)
    assert without.stdout.splitlines()[0] == f"deepspan convert train-to-infer {trained} p --config deepseek_v3"
    assert without.returncode == 2, "these are not V3's sizes"


def test_scripts_run_from_a_checkout_that_is_not_installed(tmp_path):
    """Without the interpreter's own site, nothing tells where an editable installation is."""
    packages = {str(Path(module.__file__).resolve().parent.parent) for module in (np, torch)}
    command = [sys.executable, "-S", ROOT / "scripts" / "fp8_cast_bf16.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(packages))}
    done = subprocess.run(
        [*command, "--input-fp8-hf-path", DEMO, "--output-bf16-hf-path", tmp_path / "o"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "config.json").exists()


PEAK = """
import sys
from pathlib import Path
from deepspan.convert.executor import run_plan
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
kind, source, target, workers = sys.argv[1:5]
plan = KINDS[kind].plan(Path(source), Options())
run_plan(plan, Path(target), int(workers))
# Not getrusage: its maximum counts the process that this one was forked from.
status = Path("/proc/self/status").read_text()
print(1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]))
"""


@pytest.mark.parametrize("kind", ["fp8-to-bf16", "hf-to-mindspore"])
def test_peak_memory_is_bounded(tmp_path, kind):
    """330 MB of FP8 in experts of 21 MB: at most workers x (largest tensor in + out) and 200 MB."""
    spec = make(hidden_size=4096, moe_intermediate_size=5120, n_routed_experts=4, n_group=1, topk_group=1,
                num_hidden_layers=2, intermediate_size=2048, num_nextn_predict_layers=0)  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for param in parameters(spec):
        if param.quantised:
            codes = rng.integers(0, 0x7F, param.shape, np.uint8)
            tensors[param.name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            tensors[f"{param.name}_scale_inv"] = torch.full([-(-size // 128) for size in param.shape], 2.0**-9)
        else:
            dtype = torch.float32 if param.dtype == "F32" else torch.bfloat16
            tensors[param.name] = torch.ones(param.shape, dtype=dtype)
    save_file(tensors, source / "model.safetensors")
    config = hf_config(spec) | {"quantization_config": encoders.FORMATS["fp8"].config}
    (source / "config.json").write_text(json.dumps(config))
    largest = max(tensor.nbytes for tensor in tensors.values())
    whole = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    command = [sys.executable, "-c", PEAK, kind, source, tmp_path / "out", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    bound = 2 * (largest + 2 * largest) + 200e6
    assert int(done.stdout) <= bound < whole + 200e6, f"{int(done.stdout) / 1e6:.0f} MB"


def test_every_kind_has_a_line_of_help(deepspan):
    code, text, _ = deepspan("convert", "--help")
    assert code == 0
    for kind in ("fp8-to-bf16", "hf-to-mindspore", "mindspore-to-hf", "train-to-infer", "hf-to-demo", "demo-to-hf"):
        assert kind in text


def test_v2_lite_and_kimi_shapes(deepspan, tmp_path):
    for name in ("v2-lite: no q_lora, greedy", "kimi-k2: one group, one beta"):
        source = write_random(tmp_path / name[:4], SPECS[name])
        assert deepspan("convert", "hf-to-mindspore", source, tmp_path / f"{name[:4]}-ms")[0] == 0
        assert deepspan("convert", "mindspore-to-hf", tmp_path / f"{name[:4]}-ms", tmp_path / f"{name[:4]}-hf")[0] == 0
        assert_same_tensors(stored(tmp_path / f"{name[:4]}-hf"), stored(source))
