"""Small specs with odd sizes, one for each corner of the family, and random weights for them."""

import hashlib

import numpy as np

from deepspan.models.params import parameters
from deepspan.models.spec import ModelSpec, Yarn

BASE = {
    "family": "deepseek_v3", "vocab_size": 83, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3,
    "num_attention_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 14, "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "moe_intermediate_size": 22, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "max_position_embeddings": 256,
    "yarn": Yarn(4.0, 64, mscale_all_dim=1.0), "bos_token_id": 0, "eos_token_ids": (1,),
}  # fmt: skip
V2 = {"family": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}


def make(**changes) -> ModelSpec:
    return ModelSpec(**{**BASE, **changes})


SPECS: dict[str, ModelSpec] = {
    "v3": make(),
    "v3, MTP before the norm": make(mtp_hidden="pre_norm", num_hidden_layers=2),
    "v3, half-split rope, odd heads": make(rope_interleave=False, num_attention_heads=3, num_nextn_predict_layers=0),
    "v2-lite: no q_lora, greedy": make(**V2, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
                                       n_shared_experts=2, yarn=Yarn(4.0, 64, mscale=0.707, mscale_all_dim=0.707)),
    "v2: group-limited": make(**V2, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "v2 normalised": make(**{**V2, "norm_topk_prob": True}, topk_method="greedy", n_group=1, topk_group=1),
    "kimi-k2: one group, one beta": make(family="kimi_k2", n_group=1, topk_group=1, rope_theta=50000.0,
                                         num_nextn_predict_layers=0,
                                         yarn=Yarn(4.0, 64, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0)),
    "moonlight: no yarn, eps 1e-5": make(q_lora_rank=None, yarn=None, rms_norm_eps=1e-5, num_nextn_predict_layers=0,
                                         n_group=1, topk_group=1, n_shared_experts=2),
    "every second layer MoE, no shared expert": make(num_hidden_layers=5, moe_layer_freq=2, n_shared_experts=0,
                                                     num_nextn_predict_layers=0),
    "dense only": make(n_routed_experts=0, num_experts_per_tok=0, first_k_dense_replace=3, n_group=1, topk_group=1,
                       num_nextn_predict_layers=0),
}  # fmt: skip


def random_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """float32 weights, each from a seed of its own name; large enough that routing and attention are not flat."""
    return {param.name: _values(param.name, param.shape) for param in parameters(spec)}


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    if name.endswith("e_score_correction_bias"):
        return rng.normal(0, 0.2, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 1.0 if "embed_tokens" in name else 1.5 / np.sqrt(shape[1])
    return rng.normal(0, scale, shape).astype(np.float32)
