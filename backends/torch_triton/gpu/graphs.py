"""Steps that are recorded: decode steps in a few sizes, when one is first used, and steps with prompts in sizes that
come again.

Shape letters: B sequences, Q new tokens of each.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from ....configs.schema import RunConfig
from ...base import StepBatch
from ...working import expanded_positions, recorded_tokens, records_mixed
from .inputs import DecodeBuffers
from .mixed_inputs import MixedBuffers, MixedSize, mixed_size
from .model import Model
from .recorded import Buffers, RecordedStep, Started
from .sampling import Draw

_MOST_MIXED = 64  # sizes of steps with prompts that stay recorded


class DecodeSize(NamedTuple):
    sequences: int
    queries: int
    how: Draw
    keeps_logits: bool


def sizes(max_batch: int) -> list[int]:
    """Powers of two up to ``max_batch``, and ``max_batch``."""
    powers = [1 << n for n in range(max_batch.bit_length()) if 1 << n < max_batch]
    return [*powers, max_batch]


class Recorder:
    """Makes recorded steps. They share the memory that they work in: one runs at a time."""

    def __init__(self, model: Model, run: RunConfig, device: torch.device):
        self._model, self.device = model, device
        self.longest = run.engine.max_seq_len
        self.block_size = run.engine.block_size
        self.width = -(-self.longest // self.block_size)  # of a sequence's block table
        self._records = run.engine.graphs and device.type != "cpu"
        self._pool: Any = torch.get_device_module(device).MemPool() if self._records else None  # also without any step

    def step(self, buffers: Buffers, how: Draw, keeps_logits: bool = False) -> RecordedStep:
        """Runs as it comes where nothing is recorded."""
        step = RecordedStep(self._model, buffers, how, keeps_logits)
        if self._records:
            step.record(self.device, self._pool.id)
        return step


class DecodeSteps:
    """The forward pass over decode steps: B sequences run in the smallest size that holds them."""

    def __init__(self, recorder: Recorder, max_batch: int):
        self._recorder = recorder
        self._sizes = sizes(max_batch)
        self._steps: dict[DecodeSize, RecordedStep] = {}

    def start(self, batch: StepBatch, sequences: int, queries: int, how: Draw) -> Started:
        """Queue the step, of at most ``sequences``. Every rank runs the same size."""
        count = next(size for size in self._sizes if size >= sequences)
        return self._step(DecodeSize(count, queries, how, batch.return_logits)).start(batch, self._recorder.block_size)

    def _step(self, size: DecodeSize) -> RecordedStep:
        if size not in self._steps:
            made = self._recorder
            buffers = DecodeBuffers(size.sequences, size.queries, made.width, made.longest, made.device)
            self._steps[size] = made.step(buffers, size.how, size.keeps_logits)
        return self._steps[size]


class MixedSteps:
    """The forward pass over steps with prompts whose size has come before; those used last stay."""

    def __init__(self, recorder: Recorder, run: RunConfig):
        self._recorder = recorder
        self._records, self._longest, self._expanded = records_mixed(run), recorded_tokens(run), expanded_positions(run)
        self._steps: OrderedDict[tuple[MixedSize, Draw], RecordedStep | None] = OrderedDict()

    def start(self, batch: StepBatch, how: Draw) -> Started | None:
        """Queue the step; None where it is to run as it comes. Every rank decides alike."""
        size = mixed_size(batch, self._longest, self._expanded) if self._records else None
        step = None if size is None else self._step(size, how)
        return None if step is None else step.start(batch, self._recorder.block_size)

    def _step(self, size: MixedSize, how: Draw) -> RecordedStep | None:
        """None for what comes for the first time: recording takes as long as two steps."""
        key, made = (size, how), self._recorder
        if key not in self._steps:
            self._steps[key] = None
            if len(self._steps) > _MOST_MIXED:
                self._forget()
            return None
        self._steps.move_to_end(key)
        step = self._steps[key]
        if step is None:
            step = made.step(MixedBuffers(size, made.width, made.longest, made.device), how)
            self._steps[key] = step
        return step

    def _forget(self) -> None:
        """What was used longest ago, when it has ended."""
        _, step = self._steps.popitem(last=False)
        if step is not None:
            step.wait()
