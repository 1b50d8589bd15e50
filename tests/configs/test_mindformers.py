"""MindFormers' inference YAMLs, with the keys of its samples, become the run that they describe."""

import pytest
import yaml

from deepspan.configs.schema import load_run
from deepspan.models.errors import InputError
from deepspan.models.sharding import Grid

SAMPLE = """
seed: 0
output_dir: './output'
run_mode: 'predict'
use_parallel: True
load_checkpoint: "/weights/deepseek"
load_ckpt_format: "safetensors"
auto_trans_ckpt: True
trainer: {type: CausalLanguageModelingTrainer, model_name: 'DeepSeekV3'}
parallel_config: {model_parallel: 32, pipeline_stage: 1, expert_parallel: 1, vocab_emb_dp: False}
context: {mode: 0, max_device_memory: "61GB", device_id: 0}
parallel: {parallel_mode: "STAND_ALONE", full_batch: False}
model:
  model_config:
    type: DeepseekV3Config
    batch_size: 1
    seq_length: 4096
    hidden_size: 7168
    num_layers: 61
    num_heads: 128
    kv_lora_rank: 512
    vocab_size: 129280
    compute_dtype: "bfloat16"
    use_past: True
    block_size: 16
    num_blocks: 512
    qkv_concat: False
    repetition_penalty: 1
    max_decode_length: 1024
    top_k: 1
    top_p: 1
    do_sample: False
  arch: {type: DeepseekV3ForCausalLM}
moe_config: {expert_num: 256, num_experts_chosen: 8, shared_expert_num: 1, first_k_dense_replace: 3}
processor:
  tokenizer:
    type: LlamaTokenizerFast
    vocab_file: "/weights/tokenizer.json"
    tokenizer_file: "/weights/tokenizer.json"
"""


def write(tmp_path, changes=None):
    values = yaml.safe_load(SAMPLE)
    for key, value in (changes or {}).items():
        section = values
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    path = tmp_path / "predict_deepseek3_671b.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_the_sample_becomes_a_run(tmp_path):
    notes = []
    run = load_run(write(tmp_path), note=notes.append)
    assert (run.backend, run.device, run.dtype) == ("mindspore_ascend", "ascend", "bf16")
    assert (run.model.path, run.model.tokenizer) == ("/weights/deepseek", "/weights/tokenizer.json")
    assert Grid(**run.parallel.model_dump()).world_size == 32
    assert (run.launch.launcher, run.launch.nodes, run.launch.procs_per_node) == ("msrun", 4, 8)
    engine, sampling = run.engine, run.sampling
    assert (engine.max_batch, engine.max_seq_len, engine.block_size, engine.device_memory_gib) == (1, 4096, 16, 61)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (0, 1, 1, 1024)
    assert run.model.overrides["n_routed_experts"] == 256 and run.model.overrides["num_hidden_layers"] == 61


def test_keys_without_a_meaning_are_listed_once_and_used_ones_are_not(tmp_path):
    notes = []
    load_run(write(tmp_path), note=notes.append)
    [note] = notes
    assert "model.model_config.num_blocks" in note and "trainer.model_name" in note and "context.mode" in note
    assert not any(key in note for key in ("load_checkpoint", "model_parallel", "hidden_size", "top_p", "run_mode"))


@pytest.mark.parametrize(
    ("degrees", "grid"),
    [
        ({"data_parallel": 4, "model_parallel": 4, "expert_parallel": 16}, Grid(tp=4, dp=4, ep=16)),
        ({"data_parallel": 4, "model_parallel": 4, "expert_parallel": 4}, Grid(tp=4, dp=4, ep=4)),
        ({"data_parallel": 1, "model_parallel": 16, "expert_parallel": 1}, Grid(tp=16)),
    ],
)
def test_w8a8_variants_are_quantised_and_keep_their_degrees(tmp_path, degrees, grid):
    changes = {f"parallel_config.{key}": value for key, value in degrees.items()}
    quantised = {"quant_method": "ptq", "weight_dtype": "int8", "activation_dtype": "int8"}
    run = load_run(write(tmp_path, {**changes, "model.model_config.quantization_config": quantised}))
    assert run.dtype == "w8a8"
    assert Grid(**run.parallel.model_dump()) == grid


def test_the_mcore_form_names_its_weights_otherwise(tmp_path):
    run = load_run(write(tmp_path, {"load_checkpoint": "", "pretrained_model_dir": "/weights/hf"}))
    assert run.model.path == "/weights/hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_mode": "finetune"}, "give a YAML with run_mode predict"),
        ({"context.max_device_memory": "lots"}, "write it as 61GB"),
        ({"context.max_device_memory": "6.1.2GB"}, "write it as 61GB"),
        ({"parallel_config.model_parallel": "many"}, "parallel.tp is 'many'"),
        ({"model.model_config.seq_length": "long"}, "engine.max_seq_len is 'long'"),
        ({"load_checkpoint": ""}, "model"),
    ],
)
def test_what_is_no_inference_run_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_run(write(tmp_path, changes))


def test_overrides_apply_to_the_mapped_keys(tmp_path):
    run = load_run(write(tmp_path), ["backend=torch_triton", "device=cpu", "parallel.tp=1"])
    assert (run.backend, run.device, run.parallel.tp) == ("torch_triton", "cpu", 1)


def test_a_single_rank_needs_no_launcher(tmp_path):
    run = load_run(write(tmp_path, {"parallel_config.model_parallel": 1}), note=lambda line: None)
    assert run.launch.launcher == "none"
