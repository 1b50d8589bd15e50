"""Timings of a runner's forward steps, without the engine: prefill of equal prompts, decode at a given context.

Shape letters: B sequences, M blocks a sequence.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from ..backends.base import CountsExperts, IntArray, Runner, StepBatch
from ..serving.batch import greedy_sampling

_WARM_UP_STEPS = 2  # the first steps compile, allocate and touch memory
_REPEATS = 3


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
        tokens = np.random.default_rng(0).integers(0, vocab_size, (max_batch, max_tokens))
        self._tokens_BT = tokens.astype(np.int32)
        self._tokens_per_step = tokens_per_step

    def prefill(self, sequences: int, tokens: int) -> float:
        """Seconds for prompts of ``tokens`` tokens each; the median of a few runs after a first one."""
        times = [self._fill(sequences, tokens) for _ in range(1 + _REPEATS)]
        return statistics.median(times[1:])

    def decode(self, sequences: int, context: int, steps: int) -> float:
        """Seconds of a step that adds a token to each sequence: the median of ``steps`` from ``context`` tokens on."""
        self._fill(sequences, context)
        times = []
        next_ids_B = self._tokens_BT[:sequences, 0]
        for number in range(_WARM_UP_STEPS + steps):
            start = time.perf_counter()
            # Warm-up steps write the slots that the first timed step writes again.
            position = context + max(0, number - _WARM_UP_STEPS)
            next_ids_B = self._step(next_ids_B[:, None], 0, position, outputs=1)
            times.append(time.perf_counter() - start)
        return statistics.median(times[_WARM_UP_STEPS:])

    def experts_hit(self) -> float | None:
        """Distinct routed experts a layer of the last step, if the runner can tell."""
        if not isinstance(self._runner, CountsExperts):
            return None
        hit = self._runner.experts_hit(self._last)
        return statistics.mean(hit) if hit else None

    def _fill(self, sequences: int, tokens: int) -> float:
        """Feed the prompts, as many whole ones in a step as ``tokens_per_step`` allows, or chunks of a longer one."""
        together, chunk = max(1, self._tokens_per_step // tokens), min(tokens, self._tokens_per_step)
        start = time.perf_counter()
        for sequence in range(0, sequences, together):
            rows = slice(sequence, min(sequence + together, sequences))
            for first in range(0, tokens, chunk):
                last = min(first + chunk, tokens)
                self._step(self._tokens_BT[rows, first:last], sequence, first, outputs=int(last == tokens))
        return time.perf_counter() - start

    def _step(self, tokens_BT: IntArray, sequence: int, position: int, outputs: int) -> IntArray:
        """One step of the sequences from ``sequence`` on."""
        count, length = tokens_BT.shape
        self._last = StepBatch(
            token_ids_T=np.ascontiguousarray(tokens_BT).reshape(-1),
            query_lens_B=np.full(count, length, np.int32),
            context_lens_B=np.full(count, position, np.int32),
            block_tables_BM=self._tables_BM[sequence : sequence + count],
            num_outputs_B=np.full(count, outputs, np.int32),
            sampling=greedy_sampling(count),
        )
        return self._runner.step(self._last).token_ids_O
