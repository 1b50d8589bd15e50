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
from ...working import working_bytes
from ..device import memory

_PREFIXES = 4  # times max_batch sequences of max_seq_len: more cache than that holds prefixes nobody asks for again


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
