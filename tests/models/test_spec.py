"""Reading config.json in all its spellings, refusing relatives, validating a spec at birth."""

import dataclasses
import json

import pytest

from deepspan.models.catalog import load_spec, spec_names
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.spec import Fp8Blocks, ModelSpec, Yarn

V3_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def changed(**changes) -> dict:
    return {**V3_CONFIG, **changes}


def test_the_published_config_is_the_shipped_spec():
    assert spec_from_hf(V3_CONFIG, "config.json") == load_spec("deepseek_v3")


def test_transformers_5_spelling_reads_the_same():
    config = changed(num_mtp_layers=1, rope_parameters={**V3_CONFIG["rope_scaling"], "rope_theta": 10000.0})
    del config["rope_theta"], config["num_nextn_predict_layers"]
    config["rope_parameters"]["rope_type"] = config["rope_parameters"].pop("type")
    config["rope_scaling"] = None
    assert spec_from_hf(config, "config.json") == load_spec("deepseek_v3")


def test_rope_parameters_without_scaling():
    spec = spec_from_hf(
        changed(rope_scaling=None, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 50000.0}),
        "c",
    )
    assert (spec.yarn, spec.rope_theta) == (None, 50000.0)


@pytest.mark.parametrize("value", [None, 0])
def test_no_query_latent_is_null_or_zero(value):
    assert spec_from_hf(changed(q_lora_rank=value), "c").q_lora_rank is None


def test_eos_may_be_a_list():
    assert spec_from_hf(changed(eos_token_id=[1, 7]), "c").eos_token_ids == (1, 7)


def test_family_defaults_of_native_v2_configs():
    config = {key: value for key, value in V3_CONFIG.items() if key not in ("scoring_func", "topk_method")}
    config |= {"model_type": "deepseek_v2", "n_group": None, "topk_group": None, "norm_topk_prob": False}
    spec = spec_from_hf(config, "c")
    assert (spec.scoring_func, spec.topk_method, spec.n_group) == ("softmax", "greedy", 1)
    assert not spec.has_router_bias


def test_kimi_k2_is_v3s_graph():
    spec = spec_from_hf(changed(model_type="kimi_k2"), "c")
    assert dataclasses.replace(spec, family="deepseek_v3") == load_spec("deepseek_v3")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v4", "another graph"),
        ("kimi_linear", "linear-attention"),
        ("glm_moe_dsa", "GLM-5"),
        ("qwen2", "distills"),
        ("llama", "distills"),
    ],
)
def test_relatives_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(InputError, match=f"{model_type} is not supported: config.json: .*{reason}"):
        spec_from_hf(changed(model_type=model_type), "config.json")


@pytest.mark.parametrize(
    "name", ["deepseek_v4", "DeepSeek-V4-Flash", "kimi-linear", "glm-5", "DeepSeek-R1-Distill-Qwen-32B"]
)
def test_relatives_are_refused_by_the_names_people_use(name):
    with pytest.raises(InputError, match="is not supported"):
        load_spec(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size is '7168'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn without factor"),
        ({"eos_token_id": "1"}, "not a token id"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false'"),
        ({"rope_interleave": 1}, "rope_interleave is 1"),
        ({"n_group": 7}, "n_group is 7"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
    ],
)
def test_bad_configs_name_the_key(changes, message):
    with pytest.raises(InputError, match=message):
        spec_from_hf(changed(**changes), "config.json")


def test_overrides_are_validated():
    spec = load_spec("deepseek_v3").replace(
        {
            "num_hidden_layers": 5,
            "first_k_dense_replace": 1,
            "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
        }
    )
    assert (spec.num_hidden_layers, spec.yarn) == (5, Yarn(2.0, 64))
    with pytest.raises(InputError, match="unknown key 'num_layers': model.overrides: did you mean num_hidden_layers"):
        spec.replace({"num_layers": 5})
    with pytest.raises(InputError, match="hidden_size is '5'"):
        spec.replace({"hidden_size": "5"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yarn": 3}, "yarn is 3: model.overrides: give a section of keys, or null"),
        ({"fp8": [128, 128]}, r"fp8 is \[128, 128\]: model.overrides: give a section"),
        ({"fp8": {"block": 128}}, "block is 128: model.overrides: fp8: give a list"),
        ({"fp8": {"block": [0, 128]}}, r"fp8.block is \(0, 128\)"),
        ({"fp8": {"block": ["a", 128]}}, "fp8.block is "),
        ({"eos_token_ids": 5}, "eos_token_ids is 5: model.overrides: give a list"),
        ({"yarn": {"factor": 0, "original_max_position_embeddings": 64}}, "yarn.factor is 0"),
        ({"yarn": {"factor": float("nan"), "original_max_position_embeddings": 64}}, "yarn.factor is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_sections_and_numbers_of_overrides_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        load_spec("deepseek_v3").replace(changes)


def test_a_layout_of_blocks_is_read_as_a_list():
    assert load_spec("deepseek_v3").replace({"fp8": {"block": [64, 32]}}).fp8 == Fp8Blocks((64, 32))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean deepseek_v3"):
        load_spec("deepseek_v33")


@pytest.mark.parametrize("name", spec_names())
def test_a_spec_survives_its_own_dictionary(name):
    spec = load_spec(name)
    again = spec.replace(json.loads(json.dumps(dataclasses.asdict(spec))))
    assert isinstance(again, ModelSpec)
    assert again == spec
