"""Which part of a step each data-parallel replica computes.

Each replica has its own cache, a range of the blocks that the engine counts: a sequence belongs to the replica that has
its blocks.

Shape letters as in `backends.base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Sampling, StepBatch


@dataclass(frozen=True)
class Share:
    """The part of a step that one replica computes. ``batch`` names blocks of the replica's own cache."""

    batch: StepBatch
    replica_B: NDArray[np.int64]  # which computes each sequence of the whole step
    tokens: list[int]  # of each replica
    replica_O: NDArray[np.int64]  # which computes each output of the whole step


def share_of(batch: StepBatch, replicas: int, replica: int, blocks: int) -> Share:
    """The share of one of ``replicas``, each with a cache of ``blocks`` blocks."""
    replica_B = batch.block_tables_BM[:, 0].astype(np.int64) // blocks
    tokens = np.bincount(replica_B, batch.query_lens_B, minlength=replicas).astype(int).tolist()
    own = batch if replicas == 1 else _select(batch, np.flatnonzero(replica_B == replica), blocks)
    return Share(own, replica_B, tokens, np.repeat(replica_B, batch.num_outputs_B))


def _select(batch: StepBatch, own_B: NDArray[np.int64], blocks: int) -> StepBatch:
    """The step of some of the sequences."""
    sampling, next_ids_B = batch.sampling, batch.next_token_ids_B
    is_own_B = np.isin(np.arange(len(batch.query_lens_B)), own_B)
    return StepBatch(
        token_ids_T=batch.token_ids_T[np.repeat(is_own_B, batch.query_lens_B)],
        query_lens_B=batch.query_lens_B[own_B],
        context_lens_B=batch.context_lens_B[own_B],
        block_tables_BM=batch.block_tables_BM[own_B] % blocks,
        num_outputs_B=batch.num_outputs_B[own_B],
        sampling=Sampling(
            sampling.temperature_B[own_B], sampling.top_k_B[own_B], sampling.top_p_B[own_B], sampling.seed_B[own_B]
        ),
        return_logits=batch.return_logits,
        draft=batch.draft,
        next_token_ids_B=None if next_ids_B is None else next_ids_B[own_B],
    )
