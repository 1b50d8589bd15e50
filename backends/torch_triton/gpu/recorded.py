"""A forward pass of fixed size, recorded once and replayed: the host starts it with one call, and may start the next
one before it has seen what came of it.

Shape letters: O outputs, V vocabulary, W turns.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...base import StepBatch
from ..kernels.best import Copies
from .inputs import SamplingNumbers, Step
from .model import Model
from .sampling import Draw, draw

_UNFINISHED = 2  # steps that may be on their way


class Inputs(Protocol):
    """A step's inputs on the host."""

    def fill(self, batch: StepBatch, block_size: int) -> None:
        """Take ``batch``. What was sent before must have arrived."""

    def send(self) -> None:
        """To the device, after all that was started before."""


class Buffers(Protocol):
    """A step's inputs on the device, at fixed addresses. ``turn``: int32 [1]."""

    step: Step
    sampling: SamplingNumbers
    outputs: int
    turn: Tensor
    device: torch.device

    def host(self, turn: int) -> Inputs:
        """Room for them on the host, which tells the device whose ``turn`` it is."""


class RecordedStep:
    """One size: its inputs on the device, and the forward pass over them."""

    def __init__(self, model: Model, buffers: Buffers, how: Draw, keeps_logits: bool = False):
        self._buffers = buffers
        self._model = model
        self._how = how
        self._keeps_logits = keeps_logits
        self._last_O = model.last_O[: buffers.outputs]
        pinned = buffers.device.type != "cpu"
        copies_WO = torch.zeros(_UNFINISHED, len(self._last_O), dtype=torch.int32, pin_memory=pinned)
        self._copies = Copies(copies_WO, buffers.turn)
        self._turns = [Turn(buffers, turn, copies_WO[turn]) for turn in range(_UNFINISHED)]
        self._next_turn = itertools.cycle(self._turns)
        self._recorded: tuple[Any, Tensor | None] | None = None

    def start(self, batch: StepBatch, block_size: int) -> Started:
        turn = next(self._next_turn)
        turn.begin(batch, block_size)
        if self._recorded is None:
            logits_OV = self._forward()
        else:
            graph, logits_OV = self._recorded
            graph.replay()
        turn.tokens.end()
        return Started(turn.tokens, int(batch.num_outputs_B.sum()), logits_OV)

    def wait(self) -> None:
        """Until what was started has ended."""
        for turn in self._turns:
            turn.tokens.wait()

    def first_run(self) -> None:
        """Without inputs: it compiles kernels and allocates what outlives a step; cache and outputs of others stay."""
        outputs_O = self._last_O.clone()
        self._forward()
        self._last_O.copy_(outputs_O)

    def record(self, device: torch.device, pool: Any) -> None:
        self.first_run()
        gpu = torch.get_device_module(device)
        gpu.synchronize()
        graph = gpu.CUDAGraph()
        with gpu.graph(graph, pool=pool):
            logits_OV = self._forward()
        self._recorded = graph, logits_OV

    def _forward(self) -> Tensor | None:
        step = self._buffers.step
        stream = self._model.hidden(step)
        if not self._model.is_last_stage:
            return None
        logits = self._model.logits(stream if step.rows_O is None else stream.rows(step.rows_O))
        if self._keeps_logits:
            logits = logits.joined()
        draw(logits, self._buffers.sampling, self._how, self._last_O, self._copies)
        return logits.part_OP if self._keeps_logits else None


class Tokens:
    """A step's outputs on the host, which are there when it has ended."""

    def __init__(self, token_ids_O: Tensor, device: torch.device):
        self._token_ids_O = token_ids_O
        self._ended = torch.get_device_module(device).Event() if device.type != "cpu" else None

    @classmethod
    def copied(cls, token_ids_O: Tensor) -> Tokens:
        """Of a step whose launches were all queued."""
        pinned = token_ids_O.device.type != "cpu"
        copy_O = torch.empty(token_ids_O.shape, dtype=torch.int32, pin_memory=pinned)
        tokens = cls(copy_O.copy_(token_ids_O, non_blocking=True), token_ids_O.device)
        tokens.end()
        return tokens

    def end(self) -> None:
        """All of the step has been queued."""
        if self._ended is not None:
            self._ended.record()

    def wait(self) -> None:
        """For the end of the step that these were queued for last, if any."""
        if self._ended is not None:
            self._ended.synchronize()

    def read(self, outputs: int) -> NDArray[np.int32]:
        self.wait()
        return self._token_ids_O[:outputs].numpy().copy()


class Turn:
    """What a started step needs on the host until it has ended."""

    def __init__(self, buffers: Buffers, turn: int, token_ids_O: Tensor):
        self._inputs = buffers.host(turn)
        self.tokens = Tokens(token_ids_O, buffers.device)

    def begin(self, batch: StepBatch, block_size: int) -> None:
        self.tokens.wait()
        self._inputs.fill(batch, block_size)
        self._inputs.send()


class Started(NamedTuple):
    """A step that was queued. Of a recorded size, the one after the next overwrites its tokens, the next its logits."""

    tokens: Tokens
    outputs: int
    logits_OV: Tensor | None = None  # float32, on the device, with rows for padding; where asked for, on the last stage

    def token_ids_O(self) -> NDArray[np.int32]:
        """When it has ended, on the host."""
        return self.tokens.read(self.outputs)
