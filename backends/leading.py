"""Rank 0 runs the engine and tells the other ranks every step; they follow.

A step travels as 32-bit words: a fixed first message, which most decode steps fit into, and a second one with the rest
of longer steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .base import (
    CountsExperts,
    Pending,
    Rank,
    Runner,
    Sampling,
    StartsAhead,
    StepBatch,
    StepResult,
    Weights,
    starts_ahead,
)

_FIRST_WORDS = 2048
_END = 0  # in place of a step's length
_HEADER = ("words", "tokens", "sequences", "table_width", "flags")
_RETURN_LOGITS, _DRAFT, _NEXT_IDS, _COUNTS_EXPERTS = 1, 2, 4, 8

Words = NDArray[np.int32]


class Leader:
    """Rank 0's view of ``runner``, which is loaded: its steps are those of every rank, and closing it lets them end."""

    def __init__(self, runner: Runner, rank: Rank):
        self._runner = runner
        self._rank = rank
        self.kv_blocks = runner.kv_blocks
        self.block_size = runner.block_size
        self.dtype = runner.dtype
        self.kv_dtype = runner.kv_dtype

    def load(self, weights: Weights) -> None:
        self._runner.load(weights)

    @property
    def starts_ahead(self) -> bool:
        """See `base.StartsAhead`."""
        return starts_ahead(self._runner)

    def step(self, batch: StepBatch) -> StepResult:
        _send(self._rank, pack(batch))
        return self._runner.step(batch)

    def start(self, batch: StepBatch) -> Pending:
        """See `base.StartsAhead`."""
        assert isinstance(self._runner, StartsAhead), "it says whether it does"
        _send(self._rank, pack(batch))
        return self._runner.start(batch)

    def experts_hit(self, batch: StepBatch) -> list[int]:
        """See `base.CountsExperts`."""
        if not isinstance(self._runner, CountsExperts):
            return []
        _send(self._rank, pack(batch, _COUNTS_EXPERTS))
        return self._runner.experts_hit(batch)

    def close(self) -> None:
        _send(self._rank, np.full(1, _END, np.int32))


def follow(runner: Runner, rank: Rank) -> None:
    """Take part in rank 0's steps until it closes its runner; as it does, start a step before waiting for the last."""
    pending: Pending | None = None
    for words in _received(rank):
        batch = unpack(words)
        if _flags(words) & _COUNTS_EXPERTS:
            assert isinstance(runner, CountsExperts), "rank 0's counts them"
            runner.experts_hit(batch)
            continue
        if not starts_ahead(runner):
            runner.step(batch)
            continue
        before, pending = pending, runner.start(batch)
        if before is not None:
            before.result()


def pack(batch: StepBatch, more_flags: int = 0) -> Words:
    """A step as words; floats and seeds keep their bits."""
    sampling, next_ids = batch.sampling, batch.next_token_ids_B
    flags = _RETURN_LOGITS * batch.return_logits + _DRAFT * batch.draft + _NEXT_IDS * (next_ids is not None)
    flags += more_flags
    arrays = [
        batch.token_ids_T, batch.query_lens_B, batch.context_lens_B, batch.block_tables_BM, batch.num_outputs_B,
        sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.seed_B,
    ]  # fmt: skip
    assert all(part.dtype.itemsize == 4 for part in arrays), "32-bit values, as the seam says"
    parts = [np.ascontiguousarray(part).reshape(-1).view(np.int32) for part in arrays]
    if next_ids is not None:
        parts.append(next_ids)
    words = len(_HEADER) + sum(map(len, parts))
    header = (words, len(batch.token_ids_T), *batch.block_tables_BM.shape, flags)
    return np.concatenate([np.array(header, np.int32), *parts])


def unpack(words: Words) -> StepBatch:
    """`pack` undone."""
    _, tokens, sequences, width, flags = words[: len(_HEADER)].tolist()
    rest = words[len(_HEADER) :]

    def take(count: int) -> Words:
        nonlocal rest
        taken, rest = rest[:count], rest[count:]
        return taken

    token_ids, query_lens, context_lens = take(tokens), take(sequences), take(sequences)
    tables, num_outputs = take(sequences * width).reshape(sequences, width), take(sequences)
    temperature, top_k, top_p, seed = (take(sequences) for _ in range(4))
    sampling = Sampling(temperature.view(np.float32), top_k, top_p.view(np.float32), seed.view(np.uint32))
    return StepBatch(
        token_ids, query_lens, context_lens, tables, num_outputs, sampling,
        return_logits=bool(flags & _RETURN_LOGITS), draft=bool(flags & _DRAFT),
        next_token_ids_B=take(sequences) if flags & _NEXT_IDS else None,
    )  # fmt: skip


def _flags(words: Words) -> int:
    return int(words[_HEADER.index("flags")])


def _send(rank: Rank, words: Words) -> None:
    first = np.zeros(_FIRST_WORDS, np.int32)
    first[: len(words)] = words[:_FIRST_WORDS]
    rank.broadcast(first)
    if len(words) > _FIRST_WORDS:
        rank.broadcast(words[_FIRST_WORDS:])


def _received(rank: Rank) -> Iterator[Words]:
    """Every step that rank 0 sends, until the end."""
    while True:
        first = rank.broadcast(np.zeros(_FIRST_WORDS, np.int32))
        length = int(first[0])
        if length == _END:
            return
        if length > _FIRST_WORDS:
            rest = rank.broadcast(np.zeros(length - _FIRST_WORDS, np.int32))
            yield np.concatenate([first, rest])
        else:
            yield first[:length]
