"""One step as a few runs of a graph: single tokens in one, prompts in others, each as the arrays that its graph takes.

A sequence with few new tokens decodes, each of its tokens for itself; one with many is a prompt. Prompts run together
up to a bounded number of tokens, and a longer one in pieces: a piece at an offset is a prompt whose earlier tokens are
in the cache.

Data-parallel replicas run as many parts each, of the same kinds, because they meet in every layer: one that has fewer
runs idle ones.

Shape letters: T tokens of the step, P tokens of a part, B sequences of a part, S visible tokens of a prompt part, M
blocks of a table, R rows that every replica gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...models.sharding import Grid
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
    """One run of a trunk graph. ``view`` and ``spread_R`` are `model.Trunk`'s; rows are those of the step."""

    prefill: bool
    rows_P: NDArray[np.int64]
    positions_P: IntArray
    slots_P: IntArray
    view: tuple[IntArray, ...]
    spread_R: IntArray | None = None  # with data-parallel replicas

    def take(self, ids_T: IntArray) -> IntArray:
        """The part's among the step's token ids; any for a part that is idle."""
        return ids_T[self.rows_P] if len(self.rows_P) else np.zeros(len(self.positions_P), np.int32)


@dataclass(frozen=True)
class Room:
    """One run of all replicas: through which graph, and the rows that every replica gives."""

    prefill: bool
    rows: int


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


def make_shared_parts(own: Iterator[Part], rooms: list[Room], spare_slot: int) -> Iterator[Part]:
    """A replica's parts, one for each of ``rooms``: idle, and writing ``spare_slot``, where it has none of the kind."""
    part = next(own, None)
    for room in rooms:
        if part is None or part.prefill != room.prefill:
            yield _in_room(_idle_part(room.prefill, spare_slot), room.rows)
        else:
            yield _in_room(part, room.rows)
            part = next(own, None)


def rooms_of(query_lens_B: IntArray, replica_B: NDArray[np.int64], grid: Grid, prefill_tokens: int) -> list[Room]:
    """The runs of a step: as many rows as the replica with the most tokens has, in equal shares of its ranks."""
    decodes_B = query_lens_B <= DECODE_QUERIES
    tokens = [
        [int(query_lens_B[kind_B & (replica_B == replica)].sum()) for replica in range(grid.dp)]
        for kind_B in (decodes_B, ~decodes_B)
    ]
    decoding, prompts = (max(each) for each in tokens)
    full, rest = divmod(prompts, prefill_tokens)
    runs = [(False, decoding), *[(True, prefill_tokens)] * full, (True, rest)]
    return [Room(prefill, -(-rows // grid.tp) * grid.tp) for prefill, rows in runs if rows]


def _in_room(part: Part, room: int) -> Part:
    spread_R = np.zeros(room, np.int32)
    spread_R[: len(part.positions_P)] = np.arange(len(part.positions_P))
    return replace(part, spread_R=spread_R)


def _idle_part(prefill: bool, slot: int) -> Part:
    """One token that nobody asked for."""
    zero, one, at = np.zeros(1, np.int32), np.ones(1, np.int32), np.full(1, slot, np.int32)
    view = (at, one, one) if prefill else (np.zeros((1, 1), np.int32), one)
    return Part(prefill, np.zeros(0, np.int64), zero, at, view)


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
