"""What a forward step must read and compute, from the parameter table: the floor that timings are held against."""

from __future__ import annotations

from .params import Param, parameters
from .spec import ModelSpec

# Bytes a value of a linear weight, its scales (FP8 and INT4 blocks, INT8 rows) included where they count.
LINEAR_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128**2, "w8a8": 1.0, "int4": 0.5 + 4 / 128}
CACHE_GROUP = 128  # latent values that share a scale in an FP8 cache


def distinct_experts(spec: ModelSpec, tokens: int) -> float:
    """How many routed experts of a layer a step over ``tokens`` tokens uses on average, if all are equally likely."""
    missed = 1 - spec.num_experts_per_tok / spec.n_routed_experts
    return spec.n_routed_experts * (1 - missed**tokens)


def cache_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one token's cache in one layer: 1,152 in BF16 and 656 in FP8 for V3.

    An FP8 cache has the latent's codes, an F32 scale a group of them, and the rope key in BF16 (FlashMLA's layout).
    """
    if dtype == "fp8":
        return spec.kv_lora_rank + 4 * -(-spec.kv_lora_rank // CACHE_GROUP) + 2 * spec.qk_rope_head_dim
    return spec.latent_dim * {"bf16": 2, "fp32": 4}[dtype]


def decode_bytes(
    spec: ModelSpec, batch: int, context: int, dtype: str, kv_dtype: str, experts: float | None = None
) -> int:
    """Bytes that a decode step of ``batch`` sequences reads: the weights that it uses once, and each one's cache.

    ``experts``: the distinct routed experts of a layer that the step uses, on average; None: as even routing would.

    ``dtype`` and ``kv_dtype`` say how linear weights and cache are held. Everything else is read in BF16, or in FP32
    where the linear weights are. MTP layers are not run.
    """
    plain = 4.0 if dtype == "fp32" else 2.0
    total = 0.0
    for param in parameters(spec, mtp=False):
        width = LINEAR_BYTES[dtype] if param.quantised else plain
        total += width * _values_read(spec, param, batch, distinct_experts(spec, batch) if experts is None else experts)
    return round(total) + batch * context * spec.num_hidden_layers * cache_bytes(spec, kv_dtype)


def _values_read(spec: ModelSpec, param: Param, batch: int, experts: float) -> float:
    if param.group == "embedding":
        return batch * spec.hidden_size
    if param.group == "expert":
        return param.size * experts / spec.n_routed_experts
    return param.size


def prefill_flops(spec: ModelSpec, sequences: int, tokens: int) -> int:
    """Floating-point operations of a prefill of ``sequences`` prompts of ``tokens`` tokens, one output each.

    Two for each multiplication by a weight; attention over expanded keys and values, causal half only.
    """
    head = spec.vocab_size * spec.hidden_size
    weights = sum(
        param.size
        for param in parameters(spec, mtp=False)
        if param.group not in ("embedding", "head")
        and (param.expert is None or param.expert < spec.num_experts_per_tok)
    )
    pairs = tokens * (tokens + 1) // 2
    attention = spec.num_hidden_layers * spec.num_attention_heads * (spec.qk_head_dim + spec.v_head_dim) * pairs
    return 2 * sequences * (tokens * weights + attention + head)
