"""Bad input, one row each: exit 2, one line that names the fault and what to do, nothing printed, no file left."""

import importlib.util
import json
from collections import namedtuple

import psutil
import pytest

from deepspan import backends
from tests.cli import shards
from tests.cli.conftest import DEMO

WEIGHT = "model.layers.1.mlp.experts.2.gate_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def refuse(result, *parts):
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err, result.err


def unlink(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(checkpoint):
    raw = (checkpoint / SHARD).read_bytes()
    (checkpoint / SHARD).write_bytes(raw[:-1000])


def point(checkpoint):
    (checkpoint / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2331692\n")


def misshape(checkpoint):
    shards.edit(
        checkpoint, "model.norm.weight", lambda tensors: tensors.update({"model.norm.weight": ("BF16", [4], bytes(8))})
    )


def rename_as_ranks(checkpoint):
    for rank, file in enumerate(sorted(checkpoint.glob("*.safetensors"))):
        file.rename(checkpoint / f"model{rank}-mp3.safetensors")


def grow_tokenizer(checkpoint):
    path = checkpoint / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    contents["added_tokens"] += [{"id": 1000 + i, "content": f"<new{i}>", **token} for i in range(30)]
    path.write_text(json.dumps(contents), encoding="utf-8")


def configure(**changes):
    return lambda checkpoint: shards.configure(checkpoint, **changes)


CHECKPOINTS = {
    "missing shard": (unlink(SHARD), ["absent", SHARD, "download"]),
    "truncated shard": (truncate, ["truncated", SHARD, "1000 of", "download"]),
    "LFS pointer": (point, ["git-lfs pointer", SHARD, "git lfs pull"]),
    "FP8 weight without its scale": (
        lambda c: shards.remove(c, f"{WEIGHT}_scale_inv"),
        [WEIGHT, "has no", "_scale_inv"],
    ),
    "missing tensor": (lambda c: shards.remove(c, "model.norm.weight"), ["missing: model.norm.weight"]),
    "extra tensor": (lambda c: shards.add(c, "model.stray.weight"), ["no parameter for: model.stray.weight"]),
    "misshapen tensor": (misshape, ["model.norm.weight is [4], not [192]"]),
    "no weights": (lambda c: [file.unlink() for file in c.glob("*.safetensors*")], ["no safetensors files"]),
    "no config": (unlink("config.json"), ["no config.json"]),
    "broken config": (lambda c: (c / "config.json").write_text("{"), ["invalid JSON", "config.json"]),
    "unknown model type": (configure(model_type="gpt2"), ["unknown model_type 'gpt2'", "deepseek_v3"]),
    "Llama distillation": (configure(model_type="llama"), ["llama is not supported", "dense Llama"]),
    "Qwen distillation": (configure(model_type="qwen2"), ["qwen2 is not supported", "dense Qwen"]),
    "V4": (configure(model_type="deepseek_v4"), ["deepseek_v4 is not supported", "another graph"]),
    "GLM-5": (configure(model_type="glm_moe_dsa"), ["glm_moe_dsa is not supported"]),
    "other sizes than the weights": (configure(hidden_size=256), ["not ["]),
    "rank files": (
        lambda c: [
            file.rename(c / f"model{rank}-mp3.safetensors") for rank, file in enumerate(c.glob("*.safetensors"))
        ],
        ["rank files of DeepSeek's demo", "deepspan convert demo-to-hf"],
    ),
    "no tokenizer": (unlink("tokenizer.json"), ["no tokenizer", "model.tokenizer"]),
    "tokenizer of another model": (grow_tokenizer, ["tokenizer of 1030 tokens for a model of 1024"]),
    "broken chat template": (
        lambda c: (c / "tokenizer_config.json").write_text('{"chat_template": "{% for x in"}'),
        ["chat template: unexpected", "tokenizer_config.json or chat_template.jinja", "original checkpoint"],
    ),
    "broken tokenizer": (lambda c: (c / "tokenizer.json").write_text("{}"), ["not a tokenizer.json"]),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
@pytest.mark.parametrize("command", ["generate", "logits"])
def test_a_damaged_checkpoint_is_refused_whole(deepspan, checkpoint, tmp_path, damage, command):
    act, parts = CHECKPOINTS[damage]
    act(checkpoint)
    output = ["--output", tmp_path / "out.npz"] if command == "logits" else []
    refuse(deepspan(command, checkpoint, "--prompt", "1+1", "--set", "backend=reference", *output), *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


RUNS = {
    "unknown key": ("model: {spec: demo}\nengin: {}\n", ["unknown key 'engin'", "did you mean engine?"]),
    "unknown nested key": ("model: {spec: demo}\nengine: {max_bach: 2}\n", ["did you mean engine.max_batch?"]),
    "wrong type": ("model: {spec: demo}\nengine: {max_batch: many}\n", ["engine.max_batch is 'many'"]),
    "out of range": ("model: {spec: demo}\nengine: {max_batch: 0}\n", ["engine.max_batch is 0"]),
    "no model": ("backend: reference\n", ["missing key 'model'"]),
    "weights without a path": (
        "model: {spec: deepseek_v3}\n",
        ["error: weights: checkpoint needs model.path", "correct the section model"],
    ),
    "section that is none": ("model: {spec: demo}\nengine: []\n", ["engine is []", "give a section of keys"]),
    "unknown spec": (
        "model: {spec: deepseek_v5, weights: random}\nbackend: reference\n",
        ["unknown model 'deepseek_v5'"],
    ),
    "unknown backend": ("model: {spec: demo}\nbackend: torch\n", ["backend is 'torch'"]),
    "unknown override": ("model: {spec: demo, overrides: {layers: 3}}\nbackend: reference\n", ["unknown key 'layers'"]),
    "path to nowhere": ("model: {path: nowhere}\nbackend: reference\n", ["nowhere"]),
    "key given twice": (
        "model: {spec: demo}\nengine: {max_batch: 2}\nengine: {block_size: 8}\n",
        ["key 'engine' is there twice: ", "run.yaml, line 3"],
    ),
    "not YAML": ("model: [", ["not a YAML file"]),
    "not a mapping": ("- 1\n", ["not a run configuration"]),
    "not text": (b"\xff\xfe\x00", ["not a YAML file"]),
}


@pytest.mark.parametrize("fault", RUNS)
def test_a_bad_run_yaml_is_refused(deepspan, tmp_path, fault):
    content, parts = RUNS[fault]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(deepspan("generate", path, "--prompt", "1+1"), *parts)


COMMAND_LINES = {
    "unknown run": (("generate", "nowhere", "--prompt", "x"), ["no such run: nowhere", "demo_reference"]),
    "unknown --set key": (("--set", "engine.max_bath=1"), ["unknown key 'engine.max_bath'", "engine.max_batch"]),
    "--set without value": (("--set", "engine.max_batch"), ["write it as key.path=value"]),
    "--set without the end of a key": (("--set", "engine.=1"), ["write it as key.path=value"]),
    "wrong value in --set": (("--set", "engine.max_batch=0"), ["engine.max_batch is 0: --set engine.max_batch=0: "]),
    "no run": (("generate", "", "--prompt", "x"), ["no such run"]),
    "--set below a value": (("--set", "backend.name=1"), ["backend is not a section"]),
    "--set of no YAML": (("--set", "sampling.stop=["), ["cannot read the value '['"]),
    "negative temperature": (("--temperature", "-1"), ["sampling.temperature is -1.0: command line: "]),
    "temperature that is no number": (("--temperature", "nan"), ["sampling.temperature is nan"]),
    "top_p above 1": (("--top-p", "2"), ["sampling.top_p is 2.0"]),
    "negative top_k": (("--top-k", "-1"), ["sampling.top_k is -1"]),
    "top_k without bounds": (("--top-k", str(2**40)), ["top_k"]),
    "negative seed": (("--seed", "-1"), ["sampling.seed is -1"]),
    "no tokens": (("--max-new-tokens", "0"), ["sampling.max_new_tokens is 0"]),
    "prompt longer than max_seq_len": (
        ("--set", "engine.max_seq_len=4"),
        ["prompt of 7 tokens is too long", "engine.max_seq_len = 4"],
    ),
    "more positions than the model has": (("--set", "engine.max_seq_len=5000"), ["max_seq_len 5000", "at most 4096"]),
    "prompt that is no Unicode": (("--prompt", "\udcff"), ["not valid Unicode"]),
    "no such input file": (("--input-file", "nowhere.txt"), ["cannot read the prompts: nowhere.txt"]),
    "device that the backend lacks": (("--set", "device=ascend"), ["device ascend"]),
    "several processes": (("--set", "parallel.tp=2"), ["one process"]),
    "speculation": (("--set", "engine.speculative_tokens=2"), ["not supported yet"]),
}


@pytest.mark.parametrize("fault", COMMAND_LINES)
def test_a_bad_command_line_is_refused(deepspan, tmp_path, monkeypatch, fault):
    arguments, parts = COMMAND_LINES[fault]
    if arguments[0] != "generate":
        arguments = ("generate", "demo_reference", "--prompt", "1 + 1", *arguments)
    monkeypatch.chdir(tmp_path)
    refuse(deepspan(*arguments), *parts)


FILES = {
    "no prompts": ("\n \n", ["no prompts"]),
    "broken JSON": ('{"prompt": "a"}\n\n{"prompt": \n', ["line 3", "not JSON"]),
    "text among JSON": ('{"prompt": "a"}\nhello\n', ["line 2", "not JSON"]),
    "unknown key": ('{"promt": "a"}\n', ["line 1", "did you mean prompt?"]),
    "neither": ("{}\n", ["not exactly one of prompt and messages"]),
    "both": ('{"prompt": "a", "messages": []}\n', ["not exactly one of prompt and messages"]),
    "prompt that is no text": ('{"prompt": 3}\n', ["prompt is not text"]),
    "messages that are none": ('{"messages": "hi"}\n', ["line 1", "not a list of messages"]),
    "message without content": ('{"messages": [{"role": "user"}]}\n', ["line 1", "no content"]),
    "role that the template refuses": ('{"messages": [{"role": "tool", "content": "x"}]}\n', ["chat template"]),
    "lone surrogate": ('{"prompt": "\\ud800"}\n', ["line 1", "surrogate"]),
    "not UTF-8": (b"\xff\xfe", ["not UTF-8"]),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_input_file_is_refused(deepspan, tmp_path, fault):
    content, parts = FILES[fault]
    path = tmp_path / "prompts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(deepspan("generate", "demo_reference", "--input-file", path), *parts)


def test_no_prompt_on_a_terminal_is_refused(deepspan):
    refuse(deepspan("generate", "demo_reference"), "no prompt", "--prompt")


def test_messages_cannot_be_raw(deepspan):
    line = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    refuse(deepspan("generate", "demo_reference", "--raw", stdin=line), "--raw")


def test_one_prompt_too_long_stops_the_batch_and_is_named(deepspan):
    result = deepspan(
        "generate", "demo_reference", "--prompt", "1+1", "--prompt", "1+1 " * 20, "--set", "engine.max_seq_len=16"
    )
    refuse(result, "too long", "prompt 2 of 2")


@pytest.mark.parametrize("name", ["torch_triton", "mindspore_ascend"])
def test_a_backend_whose_package_is_absent_names_the_install_command(deepspan, monkeypatch, name):
    package, command = backends.REQUIREMENTS[name]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find_spec(wanted))
    monkeypatch.setattr(backends, "is_built", lambda wanted: True)
    result = deepspan("generate", "demo_reference", "--set", f"backend={name}", "--prompt", "1+1")
    refuse(result, f"backend {name} needs the package {package}", command)


def test_a_model_that_does_not_fit_says_by_how_much(deepspan, tmp_path):
    (tmp_path / "v3.yaml").write_text(
        "model: {spec: deepseek_v3, weights: random}\nbackend: reference\nengine: {max_batch: 1, max_seq_len: 64}\n"
    )
    output = tmp_path / "out.npz"
    result = deepspan("logits", tmp_path / "v3.yaml", "--prompt-ids", "1,2", "--output", output)
    refuse(result, "not enough memory", "GiB needed", "GiB free", "GiB are missing")
    assert not output.exists()


def test_a_cache_that_does_not_fit_says_by_how_much(deepspan, monkeypatch):
    memory = namedtuple("memory", "total available")(2**30, 2**28)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    result = deepspan(
        "generate",
        "demo_reference",
        "--prompt",
        "1+1",
        "--set",
        "engine.max_batch=4096",
        "--set",
        "engine.max_seq_len=4096",
    )
    refuse(result, "not enough memory: 25.0 GiB needed, 0.2 GiB free", "24.8 GiB are missing", "engine.max_batch")


@pytest.mark.parametrize("option", ["--output", "--batch", "--prefill", "--steps", "--rtol", "--bandwidth", "DST"])
def test_other_commands_refuse_bad_numbers_and_places(deepspan, tmp_path, option):
    arguments, parts = {
        "--output": (
            ("logits", "demo_reference", "--prompt-ids", "1", "--output", tmp_path / "no" / "x.npz"),
            ["folder"],
        ),
        "--batch": (("bench", "demo_reference", "--batch", "1,0"), ["'0' is not a count", "--batch"]),
        "--prefill": (("bench", "demo_reference", "--prefill", "8"), ["is not a count", "--prefill 8"]),
        "--steps": (("bench", "demo_reference", "--steps", "-3"), ["-3 is not a count"]),
        "--bandwidth": (("plan", "demo_reference", "--decode", "1x9", "--bandwidth", "0"), ["bandwidth is 0.0"]),
        "DST": (("convert", "fp8-to-bf16", DEMO, ""), ["argument DST: the name is empty", "deepspan convert --help"]),
        "--rtol": (("compare", "a.npz", "b.npz", "--rtol", "nan"), ["rtol is nan"]),
    }[option]
    refuse(deepspan(*arguments), *parts)
    assert not list(tmp_path.iterdir())
