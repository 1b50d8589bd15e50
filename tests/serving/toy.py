"""A Runner whose next token depends on every token of its context, read back through the block table.

Any slip in scheduling (a block given away too early, a chunk at the wrong offset, a wrong output row) changes tokens.
"""

import hashlib
from dataclasses import replace

import numpy as np

from deepspan.backends.base import Pending, StepBatch, StepResult, output_rows
from deepspan.models.sampling import sample

VOCAB = 50


class ToyRunner:
    """``starts_ahead``: it takes a step before the one ahead of it was waited for."""

    def __init__(self, kv_blocks: int = 64, block_size: int = 4, starts_ahead: bool = False):
        self.kv_blocks = kv_blocks
        self.block_size = block_size
        self.starts_ahead = starts_ahead
        self.found_unfinished: list[int] = []  # steps, when each was started
        self._unfinished = 0
        self._last_O = np.zeros(0, np.int32)
        self.steps: list[StepBatch] = []
        self._cache = np.full((kv_blocks, block_size), -1)

    def load(self, weights) -> None:
        return None

    def close(self) -> None:
        return None

    def start(self, batch: StepBatch) -> Pending:
        assert self.starts_ahead
        known_T = batch.token_ids_T.copy()
        known_T[known_T < 0] = self._last_O[-1 - known_T[known_T < 0]]
        result = self.step(replace(batch, token_ids_T=known_T))
        self._last_O = result.token_ids_O
        self.found_unfinished.append(self._unfinished)
        self._unfinished += 1
        return Started(self, result)

    def step(self, batch: StepBatch) -> StepResult:
        assert (batch.token_ids_T >= 0).all()
        self.steps.append(batch)
        contexts = []
        start = 0
        for length, context, table in zip(batch.query_lens_B, batch.context_lens_B, batch.block_tables_BM, strict=True):
            for position in range(context, context + length):
                block, slot = table[position // self.block_size], position % self.block_size
                self._cache[block, slot] = batch.token_ids_T[start + position - context]
            start += length
        for length, context, table in zip(batch.query_lens_B, batch.context_lens_B, batch.block_tables_BM, strict=True):
            for end in range(context + 1, context + length + 1):
                positions = np.arange(end)
                seen = self._cache[table[positions // self.block_size], positions % self.block_size]
                assert (seen >= 0).all(), "read a slot that was never written"
                contexts.append(seen)
        rows_O, sequence_O, position_O = output_rows(batch)
        logits_OV = np.array([logits(contexts[row]) for row in rows_O], np.float32).reshape(-1, VOCAB)
        chosen = batch.sampling
        tokens_O = sample(
            logits_OV,
            position_O,
            chosen.temperature_B[sequence_O],
            chosen.top_k_B[sequence_O],
            chosen.top_p_B[sequence_O],
            chosen.seed_B[sequence_O],
        )
        return StepResult(tokens_O, logits_OV if batch.return_logits else None)


class Started:
    def __init__(self, runner: ToyRunner, result: StepResult):
        self._runner, self._result = runner, result

    def result(self) -> StepResult:
        self._runner._unfinished -= 1
        return self._result


def logits(context: np.ndarray) -> np.ndarray:
    """Random numbers seeded by the whole context."""
    digest = hashlib.sha256(np.asarray(context, "<i8").tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=VOCAB).astype(np.float32)


def greedy(prompt: list[int], count: int) -> list[int]:
    """What the toy model says after ``prompt``, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(np.array(tokens)).argmax()))
    return tokens[len(prompt) :]
