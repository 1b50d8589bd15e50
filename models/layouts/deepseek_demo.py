"""The layout of DeepSeek's own demo: ``model{i}-mp{n}.safetensors``, one file a tensor-parallel rank.

Stored tensors are cut as they are (FP8 codes and their multipliers alike), never decoded. Facts: its convert.py. Column
and row parallel weights are cut evenly; a routed expert goes whole to one rank; the rest is on every rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError
from ..spec import ModelSpec

# Second-last component of the canonical name -> (demo name, dimension that is cut between ranks).
_COMPONENTS: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "lm_head": ("head", 0),
    "head": ("head", 0),
    "norm": ("norm", None),
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
    "eh_proj": ("eh_proj", None),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "wk": ("wk", None),
    "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
}
_PARTS = {"weight": "weight", "bias": "bias", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
_FOLDERS = {"self_attn": "attn", "mlp": "ffn"}
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class DemoTensor:
    """Where one stored tensor goes: its demo name, and the rank that has it whole, or the dimension that is cut."""

    name: str
    dimension: int | None = None  # None: the same on every rank that has it
    only_rank: int | None = None  # a routed expert


def rank_file(rank: int, ranks: int) -> str:
    return f"model{rank}-mp{ranks}.safetensors"


def demo_tensor(spec: ModelSpec, stored_name: str, ranks: int) -> DemoTensor:
    """The demo's name and cut of one stored tensor (a weight, its multiplier, a norm or the router's bias)."""
    components = stored_name.removeprefix("model.").split(".")
    if len(components) < 2 or components[-1] not in _PARTS:
        raise InputError("no place in the demo's layout", stored_name, "convert to plain or FP8-block weights first")
    module, part = components[-2], _PARTS[components[-1]]
    if module == "wq_b":  # the indexer's query projection, which the demo keeps whole
        name, dimension = "wq_b", None
    elif module in _COMPONENTS:
        name, dimension = _COMPONENTS[module]
    else:
        raise InputError("no place in the demo's layout", stored_name, "it has no name for this module")
    path = [_FOLDERS.get(component, component) for component in components[:-2]]
    demo_name = ".".join([*path, name, part])
    if expert := _EXPERT.search(stored_name):
        per_rank = spec.n_routed_experts // ranks
        return DemoTensor(demo_name, only_rank=int(expert.group(1)) // per_rank)
    return DemoTensor(demo_name, dimension)
