"""Hugging Face's ``config.json``, read and written: the only place that knows its spellings and its history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .errors import InputError
from .spec import Fp8Blocks, ModelSpec, Yarn

# model_type -> family. Kimi-K2 is the V3 graph with another tokenizer; Moonlight calls itself deepseek_v3.
_FAMILIES = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "kimi_k2": "kimi_k2",
}

_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
_CONSTANTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "mla_use_nope": False,
}
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
_NOT_IN_FILES = ("family", "mtp_hidden", "latent_norm_eps", "yarn", "fp8", "eos_token_ids")

# Relatives by name that are other graphs. Keys are model_type values and the names people use for them.
REFUSED = {
    "deepseek_v4": "V4 is another graph: one shared KV head, compressed attention and four residual streams, not MLA",
    "kimi_linear": "Kimi-Linear mixes MLA with linear-attention layers that this graph does not have",
    "glm_moe_dsa": "GLM-5 selects its keys with an indexer that pairs and shares differently from DeepSeek's",
    "glm4_moe_lite": "GLM-4.7-Flash has not been checked against this graph",
    "kimi_k25": "Kimi-K2.5 and later wrap the text model with a vision tower and other tensor names",
    "deepseek_vl_v2": "DeepSeek-VL2 has a vision tower",
    "qwen2": "the Qwen distills of R1 are dense Qwen models with grouped-query attention, not DeepSeek-V3",
    "qwen3": "the Qwen distills of R1 are dense Qwen models with grouped-query attention, not DeepSeek-V3",
    "llama": "the Llama distills of R1 are dense Llama models with grouped-query attention, not DeepSeek-V3",
}
_ALIASES = {
    "deepseek_v4_flash": "deepseek_v4",
    "deepseek_v4_pro": "deepseek_v4",
    "glm5": "glm_moe_dsa",
    "glm_5": "glm_moe_dsa",
    "kimi_k2_5": "kimi_k25",
    "deepseek_r1_distill_qwen": "qwen2",
    "deepseek_r1_distill_llama": "llama",
}


def refuse_relative(name: str, where: str) -> None:
    """Raise when ``name`` (a model_type or a model's usual name) is a known relative of another architecture."""
    key = name.lower().replace("-", "_").replace(".", "_")
    for alias in (key, *(alias for alias in _ALIASES if key.startswith(alias))):
        if reason := REFUSED.get(_ALIASES.get(alias, alias)):
            raise InputError(f"{name} is not supported", where, reason)


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec of a parsed ``config.json``; ``where`` names the file in errors.

    Switches that have one value in the whole family are checked, not read: another value would be another graph.
    """
    family = _family(config, where)
    _check_constants(config, where)
    get = _Reader(config, where)
    softmax = family == "deepseek_v2"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    group_limited = get.integer("n_group", 1) > 1
    topk_method = config.get("topk_method") or ("greedy" if softmax else "noaux_tc")
    return ModelSpec(
        family=family,
        vocab_size=get.integer("vocab_size"),
        hidden_size=get.integer("hidden_size"),
        intermediate_size=get.integer("intermediate_size"),
        num_hidden_layers=get.integer("num_hidden_layers"),
        num_attention_heads=get.integer("num_attention_heads"),
        kv_lora_rank=get.integer("kv_lora_rank"),
        qk_nope_head_dim=get.integer("qk_nope_head_dim"),
        qk_rope_head_dim=get.integer("qk_rope_head_dim"),
        v_head_dim=get.integer("v_head_dim"),
        q_lora_rank=get.integer("q_lora_rank", 0) or None,  # null in HF files, 0 in the DeepSeek demo's
        n_routed_experts=get.integer("n_routed_experts", 0),
        n_shared_experts=get.integer("n_shared_experts", 0),
        num_experts_per_tok=get.integer("num_experts_per_tok", 0),
        moe_intermediate_size=get.integer("moe_intermediate_size", 0),
        first_k_dense_replace=get.integer("first_k_dense_replace", 0),
        moe_layer_freq=get.integer("moe_layer_freq", 1),
        n_group=get.integer("n_group", 1) or 1,
        topk_group=get.integer("topk_group", 1) if group_limited else 1,
        topk_method=topk_method,
        scoring_func=config.get("scoring_func") or ("softmax" if softmax else "sigmoid"),
        norm_topk_prob=get.flag("norm_topk_prob", not softmax),
        routed_scaling_factor=get.number("routed_scaling_factor", 1.0),
        num_nextn_predict_layers=get.integer("num_nextn_predict_layers", get.integer("num_mtp_layers", 0)),
        rope_theta=get.number("rope_theta", _number(rope, "rope_theta", 10000.0, where)),
        yarn=_yarn(rope, where),
        rope_interleave=get.flag("rope_interleave", True),
        max_position_embeddings=get.integer("max_position_embeddings", 4096),
        rms_norm_eps=get.number("rms_norm_eps", 1e-6),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=token_ids(config.get("eos_token_id"), f"{where}: eos_token_id"),
        fp8=_fp8(config.get("quantization_config"), where),
        index_n_heads=get.integer("index_n_heads", 0),
        index_head_dim=get.integer("index_head_dim", 0),
        index_topk=get.integer("index_topk", 0),
    )


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """A ``config.json`` that `spec_from_hf` reads as ``spec``, and other tools as DeepSeek's own.

    Of what they share ModelSpec has the same names. ``mtp_hidden`` and ``latent_norm_eps`` are not written down there.
    """
    left_out = _NOT_IN_FILES if spec.index_topk else (*_NOT_IN_FILES, *_INDEXER)  # readers ask whether it is there
    kept = {key: value for key, value in dataclasses.asdict(spec).items() if key not in left_out}
    model_type = next(name for name, family in _FAMILIES.items() if family == spec.family)
    config = {"architectures": [_ARCHITECTURES[spec.family]], "model_type": model_type, **kept}
    config |= {"num_key_value_heads": spec.num_attention_heads, "torch_dtype": "bfloat16", **_CONSTANTS}
    if spec.eos_token_ids:
        config["eos_token_id"] = spec.eos_token_ids[0] if len(spec.eos_token_ids) == 1 else list(spec.eos_token_ids)
    config["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(spec.yarn)} if spec.yarn else None
    if spec.fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(spec.fp8.block),
            **({"scale_fmt": spec.fp8.scale_fmt} if spec.fp8.scale_fmt else {}),
        }
    return config


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Token ids written as null, one id or a list of ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise InputError(f"{token!r} is not a token id", where, "give an id, a list of ids or null")
    return tuple(ids)


def _family(config: Mapping[str, Any], where: str) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("no model_type", where, "give the config.json that belongs to the checkpoint")
    refuse_relative(model_type, where)
    if model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise InputError(f"unknown model_type {model_type!r}", where, f"known model types are {known}")
    return _FAMILIES[model_type]


def _check_constants(config: Mapping[str, Any], where: str) -> None:
    for key, expected in _CONSTANTS.items():
        value = config.get(key, expected)
        if value is not None and value != expected:
            raise InputError(f"{key} is {value!r}", where, f"this family has {key} = {expected!r}: another model")


class _Reader:
    """Typed access to ``config.json`` values; null counts as absent."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config = config
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None:
            if default is None:
                raise InputError(f"no {key}", self._where, "add the key that the model was trained with")
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{key} is {value!r}", self._where, "give an integer")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key)
        if not isinstance(value, bool | None):
            raise InputError(f"{key} is {value!r}", self._where, "give true or false")
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        return _number(self._config, key, default, self._where)


def _number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{key} is {value!r}", where, "give a number")
    return float(value)


def _yarn(rope: Any, where: str) -> Yarn | None:
    """``rope_scaling`` of old files (key ``type``) and ``rope_parameters`` of transformers 5 (key ``rope_type``)."""
    where = f"{where}: rope_scaling"
    if not isinstance(rope, Mapping):
        raise InputError(f"{rope!r} is not a mapping", where, "give the rope parameters or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"rope type {kind!r}", where, "this family uses yarn or no scaling")
    for key, expected in (("truncate", True), ("attention_factor", None)):
        if rope.get(key, expected) != expected:
            raise InputError(f"{key} is {rope[key]!r}", where, f"this family has {key} = {expected!r}")
    original = rope.get("original_max_position_embeddings")
    if "factor" not in rope or not isinstance(original, int):
        raise InputError("yarn without factor or original_max_position_embeddings", where, "add them")
    return Yarn(
        factor=_number(rope, "factor", 1.0, where),
        original_max_position_embeddings=original,
        beta_fast=_number(rope, "beta_fast", 32.0, where),
        beta_slow=_number(rope, "beta_slow", 1.0, where),
        mscale=_number(rope, "mscale", 1.0, where),
        mscale_all_dim=_number(rope, "mscale_all_dim", 0.0, where),
    )


def _fp8(quantization: Any, where: str) -> Fp8Blocks | None:
    """The published FP8 storage; other quantisation methods are read tensor by tensor from the checkpoint."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Fp8Blocks(block=(rows, columns), scale_fmt=quantization.get("scale_fmt"))
    raise InputError(f"weight_block_size is {block!r}", f"{where}: quantization_config", "give [rows, columns]")
