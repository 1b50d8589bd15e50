"""What a forward step must read and compute, from the parameter table: the floor that timings are held against."""

from __future__ import annotations

from dataclasses import dataclass

from .holding import Holding, codes_beside, shard_bytes
from .params import parameters
from .sharding import Grid, shards, stage_layers
from .spec import ModelSpec

CACHE_GROUP = 128  # latent values that share a scale in an FP8 cache


@dataclass(frozen=True)
class Precision:
    """How values are held: linear weights, and the cache ("fp32", "bf16" or "fp8")."""

    weights: Holding
    cache: str


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
    spec: ModelSpec, grid: Grid, precision: Precision, batch: int, context: int, experts: float | None = None
) -> list[int]:
    """Bytes that a rank of each pipeline stage reads in a decode step of ``batch`` sequences: their sum over a device's
    bandwidth is the least time of a step, for ranks of a stage read side by side, and stages take turns.

    A rank reads the weights that it uses once, and the cache of its replica's sequences. ``experts``: the distinct
    routed experts of a layer that the step uses on all ranks together, on average, of which a rank is counted its even
    part; None: as many as even routing would. MTP layers are not run.
    """
    sequences = -(-batch // grid.dp)
    if spec.n_routed_experts and experts is None:
        experts = distinct_experts(spec, batch)
    used = experts / spec.n_routed_experts if experts else 0.0
    return [_stage_bytes(spec, grid, precision, stage, sequences, context, used) for stage in range(grid.pp)]


def _stage_bytes(
    spec: ModelSpec, grid: Grid, precision: Precision, stage: int, sequences: int, context: int, experts: float
) -> int:
    """``experts``: the part of the routed ones that is used."""
    total = 0.0
    for shard in shards(spec, grid, stage * grid.stage_ranks, mtp=False):
        param = shard.param
        size = codes_beside(shard, precision.weights) or shard_bytes(shard, precision.weights)
        rows = sequences / param.shape[0] if param.group == "embedding" else 1.0
        total += size * (experts if param.group == "expert" else rows)
    layers = len(stage_layers(spec, grid, stage))
    return round(total) + sequences * context * layers * cache_bytes(spec, precision.cache)


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
