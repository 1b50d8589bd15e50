"""How much of a device's memory a run takes: weights, what one step works in, and the cache in the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ....configs.schema import RunConfig
from ....models.capacity import GIB, weight_bytes
from ....models.costs import cache_bytes
from ....models.errors import InputError
from ....models.holding import Holding
from ....models.sharding import Shard
from ....models.spec import ModelSpec
from ...limits import cache_blocks
from ..device import memory
from .inputs import expanded_positions
from .mixed_inputs import recorded_tokens, records_mixed

_LIBRARIES = 2 << 30  # workspaces of cuBLAS and graphs, compiled kernels, fragmentation
_PREFIXES = 4  # times max_batch sequences of max_seq_len: more cache than that holds prefixes nobody asks for again


def working_bytes(spec: ModelSpec, run: RunConfig) -> int:
    """An upper estimate of what steps allocate: one of max_batch_tokens, logits, recorded ones, which keep theirs."""
    tokens, positions = run.engine.max_batch_tokens, expanded_positions(run)
    values = _step_values(spec, run, tokens, positions)
    if records_mixed(run):
        longest = recorded_tokens(run)
        values += _step_values(spec, run, min(tokens, longest), min(positions, 2 * longest))
    return 2 * values + 12 * max(run.engine.max_batch, 8) * spec.vocab_size + _LIBRARIES


def _step_values(spec: ModelSpec, run: RunConfig, tokens: int, positions: int) -> int:
    """BF16 numbers: beside the stream, the larger of attention and experts, which see as many tokens of every replica.

    ``positions`` have keys and values of all heads.
    """
    heads, hidden = spec.num_attention_heads, spec.hidden_size
    attention = tokens * heads * (2 * spec.qk_head_dim + 3 * spec.v_head_dim) + tokens * (spec.q_lora_rank or 0)
    expanded = positions * (heads * (spec.qk_nope_head_dim + spec.v_head_dim) + spec.latent_dim)
    choices = spec.num_experts_per_tok + spec.n_shared_experts
    widths = 2 * hidden + 2 * spec.moe_intermediate_size  # FP32 results count twice
    experts = run.parallel.dp * tokens * choices * widths
    dense = tokens * 4 * spec.intermediate_size
    if run.dtype in ("auto", "int4"):  # a matrix of INT4 is decoded for many tokens
        dense += hidden * 2 * spec.intermediate_size
    return 6 * tokens * hidden + max(attention + expanded, experts, dense)


def check_weights_fit(
    spec: ModelSpec, run: RunConfig, held: Iterable[Shard], holding: Holding, device: torch.device
) -> None:
    needed = sum(weight_bytes(held, holding).values()) + working_bytes(spec, run)
    allowed = _allowed(run, device)
    if needed > allowed:
        what = f"{holding.dtype} weights and room for a step need {needed / GIB:.1f} GiB"
        raise InputError(
            f"{what}, the device has {allowed / GIB:.1f} GiB",
            "engine.memory_fraction",
            "use more or larger GPUs, or lower engine.max_batch_tokens",
        )


def blocks_that_fit(spec: ModelSpec, run: RunConfig, kv_dtype: str, layers: int, device: torch.device) -> int:
    """Cache blocks for the memory that loaded weights and a step leave; InputError when no sequence would fit."""
    block_bytes = layers * run.engine.block_size * cache_bytes(spec, kv_dtype)
    room = _allowed(run, device) - working_bytes(spec, run)
    fit = max(0, room) // block_bytes
    longest = -(-run.engine.max_seq_len // run.engine.block_size)
    if fit < longest:
        missing = longest * block_bytes - room
        raise InputError(
            f"no room for the cache of {run.engine.max_seq_len} tokens: {missing / GIB:.1f} GiB are missing",
            "engine.max_seq_len",
            "lower it or engine.max_batch_tokens, or raise engine.memory_fraction",
        )
    return min(fit, _PREFIXES * cache_blocks(run, run.parallel.dp))


def _allowed(run: RunConfig, device: torch.device) -> int:
    """Bytes that this run may still take."""
    free, total = memory(device)
    if run.engine.device_memory_gib is not None:
        free, total = free - total, round(run.engine.device_memory_gib * GIB)
        free += total
    return free - round((1 - run.engine.memory_fraction) * total)
