"""MindFormers' ``predict_deepseek3_671b*.yaml`` as a run: each key is mapped, or listed as without meaning here.

Source of the keys and what they really do: MindFormers r1.5 to r1.7, ``research/deepseek3`` (the sample YAMLs, their
W8A8 and expert-parallel variants, and ``run_predict_deepseek.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..models.errors import InputError

# Key there -> key here. Where several keys there say the same, the later one wins.
_SAME = {
    "pretrained_model_dir": "model.path",
    "load_checkpoint": "model.path",
    "processor.tokenizer.vocab_file": "model.tokenizer",
    "processor.tokenizer.tokenizer_file": "model.tokenizer",
    "parallel_config.model_parallel": "parallel.tp",
    "parallel_config.expert_parallel": "parallel.ep",
    "parallel_config.data_parallel": "parallel.dp",
    "parallel_config.pipeline_stage": "parallel.pp",
    "model.model_config.batch_size": "engine.max_batch",
    "model.model_config.seq_length": "engine.max_seq_len",
    "model.model_config.block_size": "engine.block_size",
    "model.model_config.max_decode_length": "sampling.max_new_tokens",
    "model.model_config.top_k": "sampling.top_k",
    "model.model_config.top_p": "sampling.top_p",
}
# Sizes of the model: they must be what the checkpoint says, or stand in for it.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "expert_num": "n_routed_experts",
    "num_experts_chosen": "num_experts_per_tok",
    "shared_expert_num": "n_shared_experts",
    "moe_intermediate_size": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}
_NPUS = 8
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def is_mindformers(values: Mapping[str, Any]) -> bool:
    """Whether a YAML is one of MindFormers' and not a run of ours."""
    return "run_mode" in values


def run_from_mindformers(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The run as plain data, and the keys that have no meaning here.

    The device is Ascend; ``quantization_config`` makes it W8A8 (the original script ignores that key). Raises
    InputError for settings that ask for something else than inference.
    """
    keys = dict(_flatten(values))
    if keys.pop("run_mode") != "predict":
        raise InputError(f"run_mode is {values['run_mode']!r}", where, "give a YAML with run_mode predict")
    run: dict[str, Any] = {"backend": "mindspore_ascend", "device": "ascend", "model": {"overrides": {}}}
    for key, ours in _SAME.items():
        value = keys.pop(key, None)
        if value is not None and value != "":
            _put(run, ours, value)
    run["model"]["overrides"] = _sizes(keys)
    run["dtype"] = _dtype(keys)
    if keys.pop("use_parallel", False):
        run["launch"] = _launch(run.get("parallel", {}))
    if memory := keys.pop("context.max_device_memory", None):
        _put(run, "engine.device_memory_gib", _gib(memory, where))
    if keys.pop("model.model_config.do_sample", False) is False:
        _put(run, "sampling.temperature", 0)
    return run, sorted(keys)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key paths with their values; quantization_config stays whole."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and key != "quantization_config":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(run: dict[str, Any], key: str, value: Any) -> None:
    section, leaf = key.split(".")
    run.setdefault(section, {})[leaf] = value


def _sizes(keys: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, ours in _SIZES.items():
        for section in ("model.model_config.", "moe_config."):
            if (value := keys.pop(section + name, None)) is not None:
                found[ours] = value
    return found


def _launch(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """The launcher that these YAMLs are written for, unless one process is all; an Atlas node has eight NPUs."""
    degrees = [parallel.get(degree, 1) for degree in ("tp", "dp", "pp")]
    if not all(isinstance(degree, int) for degree in degrees) or (ranks := math.prod(degrees)) == 1:
        return {}  # what is no number is refused as part of the run
    return {"launcher": "msrun", "nodes": -(-ranks // _NPUS), "procs_per_node": min(ranks, _NPUS)}


def _dtype(keys: dict[str, Any]) -> str:
    quantised = keys.pop("model.model_config.quantization_config", None)
    computed = keys.pop("model.model_config.compute_dtype", "bfloat16")
    return "w8a8" if quantised else _DTYPES.get(str(computed), str(computed))


def _gib(text: Any, where: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*GB\s*", str(text))
    if not match:
        raise InputError(f"max_device_memory is {text!r}", where, "write it as 61GB")
    return float(match[1])
