"""A step over data-parallel replicas and pipeline stages: this replica's share of it, and one result of all.

Shape letters as in `backends.base`.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray

from .. import shares
from ..base import StepBatch, StepResult
from ..shares import Share
from .parallel import Mesh


def share_of(batch: StepBatch, mesh: Mesh, blocks: int) -> Share:
    """The share of this rank's replica, whose cache has ``blocks`` blocks."""
    return shares.share_of(batch, mesh.dp.size, mesh.dp.index, blocks)


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
