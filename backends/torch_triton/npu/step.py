"""One step as the operators of an NPU want it: lengths on the host, everything else on the device.

Sequences with few new tokens attend in the absorbed form on the paged cache, all in one call. Those with many attend in
the expanded form, as many together as one step may expand keys of.

Shape letters: T tokens of the step with padding, B sequences, A tokens in absorbed form, Q tokens of prompts, M cache
blocks, S positions that prompts see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...base import StepBatch
from ..plan import ABSORBED_QUERIES, Places, Rows, places_of, rows_of, visible_slots


@dataclass(frozen=True)
class Decoding:
    """Sequences in absorbed form. Ends are running sums: ``query_ends[b]`` tokens among the A up to sequence b."""

    rows: Rows
    query_ends: list[int]
    visible: list[int]  # positions that a sequence's last token sees
    tables_BM: Tensor  # int32; 0 past a sequence

    @property
    def is_single(self) -> bool:
        """Whether each sequence has one new token."""
        return self.query_ends[-1] == len(self.query_ends)


@dataclass(frozen=True)
class Prompts:
    """Sequences in expanded form; the cache entries that they see are at ``slots_S``, sequence after sequence."""

    rows: Rows
    query_ends: list[int]
    key_ends: list[int]
    slots_S: Tensor


@dataclass(frozen=True)
class Step:
    """``tokens`` of the T rows are real ones; the others make this replica's rows as many as every other's."""

    token_ids_T: Tensor
    positions_T: Tensor
    tokens: int
    slots: Tensor  # of the real tokens, in the flattened cache
    decoding: Decoding | None
    prompts: list[Prompts]


def make_step(batch: StepBatch, rows: int, block_size: int, most_keys: int, device: torch.device) -> Step:
    """``rows`` with padding. Prompts attend together as long as they see no more than ``most_keys`` positions."""
    places = places_of(batch, block_size)
    tokens = len(places.sequence_T)
    few_B = np.flatnonzero(batch.query_lens_B <= ABSORBED_QUERIES)
    many_B = np.flatnonzero(batch.query_lens_B > ABSORBED_QUERIES)

    def padded(values_N: NDArray) -> Tensor:
        return torch.from_numpy(np.pad(values_N.astype(np.int64), (0, rows - tokens))).to(device)

    return Step(
        token_ids_T=padded(batch.token_ids_T),
        positions_T=padded(places.positions_T),
        tokens=tokens,
        slots=torch.from_numpy(places.slots_T).to(device),
        decoding=_decoding(batch, places, few_B, block_size, device) if len(few_B) else None,
        prompts=[_prompts(batch, places, own_B, block_size, device) for own_B in _together(batch, many_B, most_keys)],
    )


def _rows(places: Places, own_B: NDArray[np.int64], device: torch.device) -> Rows:
    rows = rows_of(np.flatnonzero(np.isin(places.sequence_T, own_B)))
    return rows if isinstance(rows, slice) else rows.to(device)


def _visible(batch: StepBatch, own_B: NDArray[np.int64]) -> NDArray[np.int64]:
    return (batch.context_lens_B + batch.query_lens_B)[own_B].astype(np.int64)


def _decoding(
    batch: StepBatch, places: Places, own_B: NDArray[np.int64], block_size: int, device: torch.device
) -> Decoding:
    visible_B = _visible(batch, own_B)
    used_B = -(-visible_B // block_size)
    tables_BM = batch.block_tables_BM[own_B, : used_B.max()].astype(np.int32)
    tables_BM[np.arange(tables_BM.shape[1]) >= used_B[:, None]] = 0
    return Decoding(
        rows=_rows(places, own_B, device),
        query_ends=np.cumsum(batch.query_lens_B[own_B]).tolist(),
        visible=visible_B.tolist(),
        tables_BM=torch.from_numpy(tables_BM).to(device),
    )


def _together(batch: StepBatch, many_B: NDArray[np.int64], most_keys: int) -> Iterator[NDArray[np.int64]]:
    """The prompts of each call, in order; one that alone sees more than ``most_keys`` is a call of its own."""
    first, keys = 0, 0
    for place, visible in enumerate(_visible(batch, many_B).tolist()):
        if place > first and keys + visible > most_keys:
            yield many_B[first:place]
            first, keys = place, 0
        keys += visible
    if first < len(many_B):
        yield many_B[first:]


def _prompts(
    batch: StepBatch, places: Places, own_B: NDArray[np.int64], block_size: int, device: torch.device
) -> Prompts:
    visible_B = _visible(batch, own_B)
    slots = [visible_slots(batch, sequence, block_size) for sequence in own_B.tolist()]
    return Prompts(
        rows=_rows(places, own_B, device),
        query_ends=np.cumsum(batch.query_lens_B[own_B]).tolist(),
        key_ends=np.cumsum(visible_B).tolist(),
        slots_S=torch.from_numpy(np.concatenate(slots)).to(device),
    )
