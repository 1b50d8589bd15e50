"""Decode steps of fixed sizes, recorded once and replayed: the host starts a step with one call.

A step of B sequences runs in the smallest recorded size that holds them. Recording happens at the first use of a size;
`warm_up` does it for all sizes of the run at load.

Shape letters: B sequences, Q new tokens of each, O = B Q outputs, V vocabulary.
"""

from __future__ import annotations

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


class Outputs(NamedTuple):
    """Of the last step, with rows for padding; the next one overwrites them."""

    token_ids_O: NDArray[np.int32]  # on the host
    logits_OV: Tensor | None  # float32, on the device; the last pipeline stage has them


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

    def warm_up(self) -> None:
        """Record greedy steps of one token a sequence in all sizes, the largest first: others fit into its memory."""
        for count in reversed(self._sizes):
            self._step(Size(count, 1, Draw.GREEDY))

    def run(self, batch: StepBatch, sequences: int, queries: int, how: Draw) -> Outputs:
        """Run the step, of at most ``sequences``, and wait for its tokens. Every rank runs the same size."""
        count = next(size for size in self._sizes if size >= sequences)
        step = self._step(Size(count, queries, how))
        step.buffers.fill(batch, self._block_size)
        return step.run()

    def _step(self, size: Size) -> DecodeStep:
        if size not in self._steps:
            width = -(-self._longest // self._block_size)
            buffers = DecodeBuffers(size.sequences, size.queries, width, self._longest, self._device)
            self._steps[size] = DecodeStep(self._model, buffers, size.how)
            if self._records:
                self._steps[size].record(self._device, self._pool)
        return self._steps[size]


class DecodeStep:
    """One size: its buffers, and the forward pass over them, transfers in both directions included."""

    def __init__(self, model: Model, buffers: DecodeBuffers, how: Draw):
        self.buffers = buffers
        self._model = model
        self._how = how
        tokens = buffers.sequences * buffers.queries
        self._token_ids_O = torch.zeros(tokens, dtype=torch.int32, pin_memory=buffers.device.type != "cpu")
        self._recorded: tuple[Any, Tensor | None] | None = None

    def run(self) -> Outputs:
        if self._recorded is None:
            logits_OV = self._forward()
        else:
            graph, logits_OV = self._recorded
            graph.replay()
        if self.buffers.device.type != "cpu":
            torch.get_device_module(self.buffers.device).current_stream().synchronize()
        return Outputs(self._token_ids_O.numpy(), logits_OV)

    def record(self, device: torch.device, pool: Any) -> None:
        """After a first run, which compiles kernels and allocates what outlives a step."""
        gpu = torch.get_device_module(device)
        self._forward()
        gpu.synchronize()
        graph = gpu.CUDAGraph()
        with gpu.graph(graph, pool=pool):
            logits_OV = self._forward()
        self._recorded = graph, logits_OV

    def _forward(self) -> Tensor | None:
        self.buffers.send()
        stream = self._model.hidden(self.buffers.step)
        if not self._model.is_last_stage:
            return None
        logits_OV = self._model.logits(stream)
        self._token_ids_O.copy_(draw(logits_OV, self.buffers.sampling, self._how), non_blocking=True)
        return logits_OV
