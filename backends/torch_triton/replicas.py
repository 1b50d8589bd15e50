"""A step over data-parallel replicas and pipeline stages: which sequences are this replica's, and one result of all.

Each replica has its own cache, a range of the blocks that the engine counts: a sequence belongs to the replica that has
its blocks.

Shape letters as in `backends.base`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from ..base import Sampling, StepBatch, StepResult
from .parallel import Mesh


@dataclass(frozen=True)
class Share:
    """The part of a step that this rank's replica computes. ``batch`` names blocks of the replica's own cache."""

    batch: StepBatch
    tokens: list[int]  # of each replica
    replica_O: NDArray[np.int64]  # which computes each output of the whole step


def share_of(batch: StepBatch, mesh: Mesh, blocks: int) -> Share:
    """The share of this rank's replica, whose cache has ``blocks`` blocks."""
    replica_B = batch.block_tables_BM[:, 0].astype(np.int64) // blocks
    tokens = np.bincount(replica_B, batch.query_lens_B, minlength=mesh.dp.size).astype(int).tolist()
    own = batch if mesh.dp.size == 1 else _select(batch, np.flatnonzero(replica_B == mesh.dp.index), blocks)
    return Share(own, tokens, np.repeat(replica_B, batch.num_outputs_B))


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


def whole_result(share: Share, own: StepResult | None, mesh: Mesh, vocab_size: int) -> StepResult:
    """The result of the whole step on every rank. ``own`` is that of the share, which the last stage has."""
    if mesh.dp.size == mesh.pp.size == 1:
        assert own is not None, "the only stage is the last one"
        return own
    outputs, batch = len(share.replica_O), share.batch
    result = StepResult(
        token_ids_O=np.empty(outputs, np.int32),
        logits_OV=np.empty((outputs, vocab_size), np.float32) if batch.return_logits else None,
        draft_token_ids_O=np.empty(outputs, np.int32) if batch.draft else None,
        draft_logits_OV=np.empty((outputs, vocab_size), np.float32) if batch.draft and batch.return_logits else None,
    )
    for field in fields(StepResult):
        if (whole := getattr(result, field.name)) is not None:
            _fill(whole, None if own is None else getattr(own, field.name), share, mesh)
    return result


def _fill(whole_O: NDArray, own_Q: NDArray | None, share: Share, mesh: Mesh) -> None:
    """Rows of all replicas in the order of the step, which the last stage has, on every stage."""
    room_O = torch.from_numpy(whole_O)
    if own_Q is not None:
        counts = np.bincount(share.replica_O, minlength=mesh.dp.size).tolist()
        order_O = torch.from_numpy(share.replica_O.argsort(kind="stable"))
        room_O[order_O] = mesh.dp.below(torch.from_numpy(own_Q), counts)
    mesh.pp.from_last(room_O)
