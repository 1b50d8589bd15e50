"""Timings of a runner's forward steps, without the engine: prefill of equal prompts, decode at a given context.

Shape letters: B sequences, M blocks a sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator

import numpy as np

from ..backends.base import CountsExperts, IntArray, Runner, StepBatch, StepResult, starts_ahead
from ..serving.batch import greedy_sampling

_WARM_UP_STEPS = 2  # the first steps compile, allocate and touch memory
_REPEATS = 3


def random_tokens(vocab_size: int, sequences: int, tokens: int) -> IntArray:
    """Prompts [sequences, tokens], always the same."""
    return np.random.default_rng(0).integers(0, vocab_size, (sequences, tokens)).astype(np.int32)


class Timer:
    """Runs steps over ``max_batch`` sequences of up to ``max_tokens`` tokens that own the cache of ``runner``.

    They take turns in going to the data-parallel ``replicas``.
    """

    def __init__(
        self, runner: Runner, vocab_size: int, max_batch: int, max_tokens: int, tokens_per_step: int, replicas: int = 1
    ):
        blocks, room = -(-max_tokens // runner.block_size), runner.kv_blocks // replicas
        assert -(-max_batch // replicas) * blocks <= room, "the run was made for these sizes"
        self._runner = runner
        number_B = np.arange(max_batch)
        first_B = number_B % replicas * room + number_B // replicas * blocks
        self._tables_BM = (first_B[:, None] + np.arange(blocks)).astype(np.int32)
        self._tokens_BT = random_tokens(vocab_size, max_batch, max_tokens)
        self._tokens_per_step = tokens_per_step

    def prefill(self, sequences: int, tokens: int) -> float:
        """Seconds for prompts of ``tokens`` tokens each; the median of a few runs after a first one."""
        times = [self._fill(sequences, tokens) for _ in range(1 + _REPEATS)]
        return statistics.median(times[1:])

    def decode(self, sequences: int, context: int, steps: int) -> float:
        """Seconds of a step that adds a token to each sequence: the median of ``steps`` from ``context`` tokens on.

        As the engine does, a runner that can is given each step before the one ahead of it has ended.
        """
        self._fill(sequences, context)
        # Warm-up steps write the slots that the first timed step writes again.
        positions = [context] * _WARM_UP_STEPS + [context + number for number in range(steps)]
        first_B1 = self._tokens_BT[:sequences, :1]
        ends = self._queued(first_B1, positions) if starts_ahead(self._runner) else self._in_turn(first_B1, positions)
        times = np.diff(ends)[_WARM_UP_STEPS - 1 :]
        return statistics.median(times.tolist())

    def _in_turn(self, token_ids_B1: IntArray, positions: list[int]) -> list[float]:
        """When each step had ended."""
        ends = []
        for position in positions:
            token_ids_B1 = self._step(token_ids_B1, 0, position, outputs=1)[:, None]
            ends.append(time.perf_counter())
        return ends

    def _queued(self, token_ids_B1: IntArray, positions: list[int]) -> list[float]:
        unknown_B1 = -1 - np.arange(len(token_ids_B1), dtype=np.int32)[:, None]
        given = [token_ids_B1, *[unknown_B1] * (len(positions) - 1)]
        batches = (self._batch(part_B1, 0, at, outputs=1) for part_B1, at in zip(given, positions, strict=True))
        ends, known = [], [token_ids_B1]
        for result in self._results(batches):
            ends.append(time.perf_counter())
            known.append(result.token_ids_O[:, None])
        self._last = self._batch(known[-2], 0, positions[-1], outputs=1)
        return ends

    def _results(self, batches: Iterable[StepBatch]) -> Iterator[StepResult]:
        """Of steps each of which is started before the one ahead has ended, if the runner can."""
        runner, pending = self._runner, None
        for batch in batches:
            self._last = batch
            if not starts_ahead(runner):
                yield runner.step(batch)
                continue
            following = runner.start(batch)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()

    def repeat(self) -> None:
        """The last step again."""
        self._runner.step(self._last)

    def experts_hit(self) -> float | None:
        """Distinct routed experts a layer of the last step, if the runner can tell."""
        if not isinstance(self._runner, CountsExperts):
            return None
        hit = self._runner.experts_hit(self._last)
        return statistics.mean(hit) if hit else None

    def _fill(self, sequences: int, tokens: int) -> float:
        """Feed the prompts, as many whole ones in a step as ``tokens_per_step`` allows, or chunks of a longer one.

        As the engine does, a runner that can is given each step before the one ahead of it has ended.
        """
        start = time.perf_counter()
        for _ in self._results(self._prompts(sequences, tokens)):
            pass
        return time.perf_counter() - start

    def _prompts(self, sequences: int, tokens: int) -> Iterator[StepBatch]:
        together, chunk = max(1, self._tokens_per_step // tokens), min(tokens, self._tokens_per_step)
        for sequence in range(0, sequences, together):
            rows = slice(sequence, min(sequence + together, sequences))
            for first in range(0, tokens, chunk):
                last = min(first + chunk, tokens)
                yield self._batch(self._tokens_BT[rows, first:last], sequence, first, outputs=int(last == tokens))

    def _step(self, tokens_BT: IntArray, sequence: int, position: int, outputs: int) -> IntArray:
        """One step of the sequences from ``sequence`` on."""
        self._last = self._batch(tokens_BT, sequence, position, outputs)
        return self._runner.step(self._last).token_ids_O

    def _batch(self, tokens_BT: IntArray, sequence: int, position: int, outputs: int) -> StepBatch:
        count, length = tokens_BT.shape
        return StepBatch(
            token_ids_T=np.ascontiguousarray(tokens_BT).reshape(-1),
            query_lens_B=np.full(count, length, np.int32),
            context_lens_B=np.full(count, position, np.int32),
            block_tables_BM=self._tables_BM[sequence : sequence + count],
            num_outputs_B=np.full(count, outputs, np.int32),
            sampling=greedy_sampling(count),
        )
