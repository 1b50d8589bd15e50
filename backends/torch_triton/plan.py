"""What a ragged batch asks of attention, worked out once a step for all layers.

Sequences with few new tokens attend in the absorbed form, token by token; sequences with many in the expanded form,
one sequence at a time. Tokens that see the same number of cache blocks attend together: how far a token's keys are
padded depends on its own position only, so its result has the same bits in any batch.

Shape letters: T tokens of the step, B sequences, A tokens in absorbed form, G those of one group, M cache blocks,
S positions of the blocks, Q new tokens of one sequence, V positions that its last one sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..base import StepBatch

ABSORBED_QUERIES = 4  # up to so many new tokens a sequence is decoding, drafts included, and not reading a prompt
Rows = slice | Tensor


@dataclass(frozen=True)
class Group:
    """Tokens in absorbed form that see M blocks each: their rows among the A, and 0 or -inf for each position."""

    rows: Rows
    blocks_GM: Tensor
    mask_GS: Tensor


@dataclass(frozen=True)
class Prompt:
    """A sequence in expanded form: its rows among the T, and 0 or -inf for each query and visible position.

    Without cached tokens before the new ones the mask is None: plainly causal.
    """

    rows: slice
    blocks_M: Tensor
    visible: int
    mask_QS: Tensor | None


@dataclass(frozen=True)
class Plan:
    """``positions_T`` in the sequences, ``slots_T`` in the flattened cache, and which tokens attend how."""

    positions_T: Tensor
    slots_T: Tensor
    absorbed_rows: Rows
    groups: list[Group]
    prompts: list[Prompt]
    replica_tokens: list[int]  # of the step, of each data-parallel replica


class Places(NamedTuple):
    """Whose each new token of a step is, its position there, and its slot in the flattened cache.

    ``starts_B``: each sequence's first row among the T.
    """

    sequence_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]
    starts_B: NDArray[np.int64]


def places_of(batch: StepBatch, block_size: int) -> Places:
    lens_B = batch.query_lens_B.astype(np.int64)
    sequence_T = np.repeat(np.arange(len(lens_B)), lens_B)
    starts_B = np.cumsum(lens_B) - lens_B
    positions_T = np.arange(len(sequence_T)) - starts_B[sequence_T] + batch.context_lens_B[sequence_T]
    blocks_T = batch.block_tables_BM[sequence_T, positions_T // block_size].astype(np.int64)
    return Places(sequence_T, positions_T, blocks_T * block_size + positions_T % block_size, starts_B)


def visible_slots(batch: StepBatch, sequence: int, block_size: int) -> NDArray[np.int64]:
    """Where the flattened cache holds all positions that a sequence's last new token sees, in order."""
    positions_V = np.arange(batch.context_lens_B[sequence] + batch.query_lens_B[sequence])
    blocks_V = batch.block_tables_BM[sequence, positions_V // block_size].astype(np.int64)
    return blocks_V * block_size + positions_V % block_size


def make_plan(batch: StepBatch, block_size: int, dtype: torch.dtype, replica_tokens: list[int]) -> Plan:
    """The plan of one step, of this replica's part of it; masks are in ``dtype``."""
    sequence_T, positions_T, slots_T, starts_B = places_of(batch, block_size)
    absorbed_A = np.flatnonzero(batch.query_lens_B[sequence_T] <= ABSORBED_QUERIES)
    prompts_B = np.flatnonzero(batch.query_lens_B > ABSORBED_QUERIES)
    return Plan(
        positions_T=torch.from_numpy(positions_T),
        slots_T=torch.from_numpy(slots_T),
        absorbed_rows=rows_of(absorbed_A),
        groups=list(_groups(batch, sequence_T[absorbed_A], positions_T[absorbed_A], block_size, dtype)),
        prompts=[_prompt(batch, b, int(starts_B[b]), block_size, dtype) for b in prompts_B.tolist()],
        replica_tokens=replica_tokens,
    )


def _groups(
    batch: StepBatch, sequence_A: NDArray[np.int64], position_A: NDArray[np.int64], block_size: int, dtype: torch.dtype
) -> Iterator[Group]:
    count_A = position_A // block_size + 1
    for count in np.unique(count_A).tolist():
        rows_G = np.flatnonzero(count_A == count)
        blocks_GM = batch.block_tables_BM[sequence_A[rows_G], :count].astype(np.int64)
        yield Group(rows_of(rows_G), torch.from_numpy(blocks_GM), _mask(position_A[rows_G], count * block_size, dtype))


def _prompt(batch: StepBatch, sequence: int, start: int, block_size: int, dtype: torch.dtype) -> Prompt:
    context, new = int(batch.context_lens_B[sequence]), int(batch.query_lens_B[sequence])
    visible = context + new
    blocks_M = batch.block_tables_BM[sequence, : -(-visible // block_size)].astype(np.int64)
    mask_QS = _mask(np.arange(context, visible), visible, dtype) if context else None
    return Prompt(slice(start, start + new), torch.from_numpy(blocks_M), visible, mask_QS)


def _mask(position_Q: NDArray[np.int64], positions: int, dtype: torch.dtype) -> Tensor:
    """[Q, positions]: 0 up to the token's own position, -inf after it."""
    later_QS = torch.arange(positions) > torch.from_numpy(position_Q)[:, None]
    return torch.zeros(later_QS.shape, dtype=dtype).masked_fill_(later_QS, float("-inf"))


def rows_of(index: NDArray[np.int64]) -> Rows:
    """Consecutive rows as a slice, which costs no copy."""
    if len(index) and index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index)
