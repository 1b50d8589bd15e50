"""One step as a few runs of a graph: single tokens in one, prompts in others, each as the arrays that its graph takes.

A sequence with few new tokens decodes, each of its tokens for itself; one with many is a prompt. Prompts run together
up to a bounded number of tokens, and a longer one in pieces: a piece at an offset is a prompt whose earlier tokens are
in the cache.

Shape letters: T tokens of the step, P tokens of a part, B sequences of a part, S visible tokens of a prompt part, M
blocks of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..base import IntArray, StepBatch

DECODE_QUERIES = 4  # up to so many new tokens a sequence is decoding, drafts included, and not reading a prompt


@dataclass(frozen=True)
class Segment:
    """Consecutive new tokens of one sequence: rows ``start`` to ``stop`` of the step, from position ``position`` on."""

    sequence: int
    start: int
    stop: int
    position: int

    @property
    def visible(self) -> int:
        return self.position + self.stop - self.start


@dataclass(frozen=True)
class Part:
    """One run of a trunk graph. ``view`` is `model.Trunk`'s; rows are those of the step."""

    prefill: bool
    rows_P: NDArray[np.int64]
    positions_P: IntArray
    slots_P: IntArray
    view: tuple[IntArray, ...]


def make_parts(batch: StepBatch, block_size: int, prefill_tokens: int) -> Iterator[Part]:
    """All parts of a step, prompts in parts of up to ``prefill_tokens``; pieces of a sequence come in their order."""
    stops_B = np.cumsum(batch.query_lens_B)
    whole = [
        Segment(b, int(stop - count), int(stop), int(context))
        for b, (stop, count, context) in enumerate(zip(stops_B, batch.query_lens_B, batch.context_lens_B, strict=True))
    ]
    decoding = [segment for segment in whole if segment.stop - segment.start <= DECODE_QUERIES]
    if decoding:
        yield _decode_part(decoding, batch.block_tables_BM, block_size)
    for group in _prefill_groups([segment for segment in whole if segment not in decoding], prefill_tokens):
        yield _prefill_part(group, batch.block_tables_BM, block_size)


def _prefill_groups(segments: list[Segment], tokens: int) -> Iterator[list[Segment]]:
    group: list[Segment] = []
    room = tokens
    for segment in segments:
        while segment.stop > segment.start:
            piece, segment = _cut(segment, room)
            group.append(piece)
            room -= piece.stop - piece.start
            if not room:
                yield group
                group, room = [], tokens
    if group:
        yield group


def _cut(segment: Segment, tokens: int) -> tuple[Segment, Segment]:
    """The first ``tokens`` of a segment and the rest of it, either of which may be all."""
    middle = min(segment.start + tokens, segment.stop)
    rest = Segment(segment.sequence, middle, segment.stop, segment.position + middle - segment.start)
    return Segment(segment.sequence, segment.start, middle, segment.position), rest


def _slots(tables_BM: IntArray, sequence: int, positions: NDArray[np.int64], block_size: int) -> IntArray:
    return tables_BM[sequence, positions // block_size] * block_size + (positions % block_size).astype(np.int32)


def _tokens(
    segments: list[Segment], tables_BM: IntArray, block_size: int
) -> tuple[NDArray[np.int64], IntArray, IntArray]:
    """Rows, positions and slots of the segments' tokens."""
    rows = [np.arange(segment.start, segment.stop) for segment in segments]
    positions = [np.arange(segment.position, segment.visible) for segment in segments]
    slots = [
        _slots(tables_BM, segment.sequence, at, block_size) for segment, at in zip(segments, positions, strict=True)
    ]
    return np.concatenate(rows), np.concatenate(positions).astype(np.int32), np.concatenate(slots)


def _decode_part(segments: list[Segment], tables_BM: IntArray, block_size: int) -> Part:
    rows_P, positions_P, slots_P = _tokens(segments, tables_BM, block_size)
    sequence_P = np.concatenate([np.full(segment.stop - segment.start, segment.sequence) for segment in segments])
    visible_P = positions_P + np.int32(1)
    width = int(visible_P.max() - 1) // block_size + 1
    beyond_PM = np.arange(width) * block_size >= visible_P[:, None]
    tables_PM = np.where(beyond_PM, np.int32(0), tables_BM[sequence_P, :width])  # read and then masked
    return Part(False, rows_P, positions_P, slots_P, (tables_PM, visible_P))


def _prefill_part(segments: list[Segment], tables_BM: IntArray, block_size: int) -> Part:
    rows_P, positions_P, slots_P = _tokens(segments, tables_BM, block_size)
    key_slots_S = np.concatenate(
        [_slots(tables_BM, segment.sequence, np.arange(segment.visible), block_size) for segment in segments]
    )
    query_ends_B = np.cumsum([segment.stop - segment.start for segment in segments]).astype(np.int32)
    key_ends_B = np.cumsum([segment.visible for segment in segments]).astype(np.int32)
    return Part(True, rows_P, positions_P, slots_P, (key_slots_S, query_ends_B, key_ends_B))
