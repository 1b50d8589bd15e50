"""Decode steps of fixed sizes, recorded once and replayed: the host starts a step with one call, and may start the next
one before it has seen what came of it.

A step of B sequences runs in the smallest size that holds them, which is recorded when it is first used.

Shape letters: B sequences, Q new tokens of each, O = B Q outputs, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....configs.schema import RunConfig
from ...base import StepBatch
from .inputs import DecodeBuffers
from .model import Model
from .sampling import Draw, draw

_UNFINISHED = 2  # steps that may be on their way


class Size(NamedTuple):
    sequences: int
    queries: int
    how: Draw


def sizes(max_batch: int) -> list[int]:
    """Powers of two up to ``max_batch``, and ``max_batch``."""
    powers = [1 << n for n in range(max_batch.bit_length()) if 1 << n < max_batch]
    return [*powers, max_batch]


class DecodeSteps:
    """The forward pass over decode steps; ``width`` and ``longest`` bound a sequence's blocks and tokens."""

    def __init__(self, model: Model, run: RunConfig, device: torch.device):
        self._model = model
        self._device = device
        self._block_size = run.engine.block_size
        self._longest = run.engine.max_seq_len
        self._sizes = sizes(run.engine.max_batch)
        self._records = run.engine.graphs and device.type != "cpu"
        self._pool = torch.get_device_module(device).graph_pool_handle() if self._records else None
        self._steps: dict[Size, DecodeStep] = {}

    def start(self, batch: StepBatch, sequences: int, queries: int, how: Draw) -> Started:
        """Queue the step, of at most ``sequences``. Every rank runs the same size."""
        count = next(size for size in self._sizes if size >= sequences)
        return self._step(Size(count, queries, how)).start(batch, self._block_size)

    def _step(self, size: Size) -> DecodeStep:
        if size not in self._steps:
            width = -(-self._longest // self._block_size)
            buffers = DecodeBuffers(size.sequences, size.queries, width, self._longest, self._device)
            self._steps[size] = DecodeStep(self._model, buffers, size.how)
            if self._records:
                self._steps[size].record(self._device, self._pool)
        return self._steps[size]


class DecodeStep:
    """One size: its inputs on the device, and the forward pass over them."""

    def __init__(self, model: Model, buffers: DecodeBuffers, how: Draw):
        self._buffers = buffers
        self._model = model
        self._how = how
        self._last_O = model.last_O[: buffers.sequences * buffers.queries]
        self._turns = itertools.cycle([Turn(buffers, self._last_O) for _ in range(_UNFINISHED)])
        self._recorded: tuple[Any, Tensor | None] | None = None

    def start(self, batch: StepBatch, block_size: int) -> Started:
        turn = next(self._turns)
        turn.begin(batch, block_size)
        if self._recorded is None:
            logits_OV = self._forward()
        else:
            graph, logits_OV = self._recorded
            graph.replay()
        turn.end(self._last_O)
        return Started(turn, len(batch.token_ids_T), logits_OV)

    def record(self, device: torch.device, pool: Any) -> None:
        """After a first run, which compiles kernels and allocates what outlives a step; outputs of others stay."""
        gpu = torch.get_device_module(device)
        outputs_O = self._last_O.clone()
        self._forward()
        self._last_O.copy_(outputs_O)
        gpu.synchronize()
        graph = gpu.CUDAGraph()
        with gpu.graph(graph, pool=pool):
            logits_OV = self._forward()
        self._recorded = graph, logits_OV

    def _forward(self) -> Tensor | None:
        stream = self._model.hidden(self._buffers.step)
        if not self._model.is_last_stage:
            return None
        logits_OV = self._model.logits(stream)
        self._last_O.copy_(draw(logits_OV, self._buffers.sampling, self._how))
        return logits_OV


class Turn:
    """What a started step needs on the host until it has ended."""

    def __init__(self, buffers: DecodeBuffers, last_O: Tensor):
        self._on_gpu = last_O.device.type != "cpu"
        self._inputs = buffers.host()
        self.token_ids_O = torch.zeros(len(last_O), dtype=torch.int32, pin_memory=self._on_gpu)
        self._ended = torch.get_device_module(last_O.device).Event() if self._on_gpu else None

    def begin(self, batch: StepBatch, block_size: int) -> None:
        self.wait()
        self._inputs.fill(batch, block_size)
        self._inputs.send()

    def end(self, last_O: Tensor) -> None:
        self.token_ids_O.copy_(last_O, non_blocking=True)
        if self._ended is not None:
            self._ended.record()

    def wait(self) -> None:
        """For the end of the step that had this turn last, if any."""
        if self._ended is not None:
            self._ended.synchronize()


class Started(NamedTuple):
    """A step that was queued. Of its size, the one after the next overwrites its tokens, the next its logits."""

    turn: Turn
    outputs: int
    logits_OV: Tensor | None  # float32, on the device, with rows for padding; the last pipeline stage has them

    def token_ids_O(self) -> NDArray[np.int32]:
        """When it has ended, on the host."""
        self.turn.wait()
        return self.turn.token_ids_O[: self.outputs].numpy().copy()
