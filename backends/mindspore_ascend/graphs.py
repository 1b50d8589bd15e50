"""The compiled graphs of a model, each with every length symbolic: compiled at its first use, once.

Letters: T tokens, B sequences, O outputs, S visible tokens, M blocks of a table, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from ...models.spec import ModelSpec
from ..base import FloatArray, IntArray
from .model import MTP, Draft, Forward, Head, Layers, Trunk
from .plan import Part
from .sampling import Sampler

MAX_GRAPHS = 5  # trunk with head, and draft, for prompts and for single tokens; sampler


def _lengths(*shape: int | None, dtype: ms.Type = ms.int32) -> Tensor:
    """A graph input: None is a length that may change from call to call."""
    return Tensor(shape=list(shape), dtype=dtype)


def _view(prefill: bool) -> tuple[Tensor, ...]:
    return (_lengths(None), _lengths(None), _lengths(None)) if prefill else (_lengths(None, None), _lengths(None))


class Graphs:
    """What the runner calls: numpy in, hidden states stay on the device, numpy out."""

    def __init__(self, spec: ModelSpec, layers: Layers, head: Head, mtp: MTP | None, dtype: ms.Type, replicas: int):
        hidden, logits = (
            _lengths(None, spec.hidden_size, dtype=dtype),
            _lengths(None, spec.vocab_size, dtype=ms.float32),
        )
        row, real = _lengths(None), _lengths(None, dtype=ms.float32)
        spread = row if replicas > 1 else None
        self._forwards = {prefill: Forward(Trunk(layers, prefill), head) for prefill in (False, True)}
        for prefill, forward in self._forwards.items():
            forward.set_inputs(row, row, row, row, spread, *_view(prefill))
        self._sampler = Sampler()
        self._sampler.set_inputs(logits, row, row, real, row, real, row)
        self._drafts = {prefill: Draft(layers.turns, mtp, prefill) for prefill in (False, True)} if mtp else {}
        for prefill, draft in self._drafts.items():
            draft.set_inputs(hidden, row, row, row, row, spread, *_view(prefill))

    @property
    def has_drafts(self) -> bool:
        return bool(self._drafts)

    @property
    def compiled(self) -> int:
        """How many graphs have been compiled so far."""
        cells: list[nn.Cell] = [*self._forwards.values(), self._sampler, *self._drafts.values()]
        return sum(len(cell.compile_cache) for cell in cells)

    def forward(self, part: Part, token_ids_P: IntArray, rows_Q: NDArray) -> tuple[Tensor, Tensor, IntArray]:
        """Hidden states of a part's tokens and logits of the given rows, left on the device, and their greedy tokens.

        Writes the cache.
        """
        forward: Any = self._forwards[part.prefill]
        rows = Tensor(rows_Q.astype(np.int32))
        hidden_PD, logits_QV, greedy_Q = forward(rows, Tensor(token_ids_P), *_where(part), *_tensors(part.view))
        return hidden_PD, logits_QV, greedy_Q.asnumpy()

    def sample(self, logits_OV: Tensor, *numbers_O: NDArray) -> IntArray:
        """Drawn tokens; ``numbers_O`` are greedy tokens, positions, temperatures, top_k, top_p and seeds."""
        sampled: IntArray = self._sampler(logits_OV, *_tensors(numbers_O)).asnumpy()
        return sampled

    def draft(
        self, part: Part, hidden_PD: Tensor, next_ids_P: IntArray, rows_O: NDArray
    ) -> tuple[FloatArray, IntArray]:
        """The MTP layer over all tokens of a part; logits and greedy tokens of the given rows."""
        rows = Tensor(rows_O.astype(np.int32))
        draft: Any = self._drafts[part.prefill]
        logits_OV, greedy_O = draft(hidden_PD, Tensor(next_ids_P), rows, *_where(part), *_tensors(part.view))
        return logits_OV.asnumpy(), greedy_O.asnumpy()


def _where(part: Part) -> tuple[Tensor | None, ...]:
    spread = None if part.spread_R is None else Tensor(part.spread_R)
    return Tensor(part.positions_P), Tensor(part.slots_P), spread


def _tensors(arrays: tuple[NDArray, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(np.ascontiguousarray(array)) for array in arrays)
