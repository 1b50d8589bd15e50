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
from .model import MTP, Draft, Head, Layers, Trunk
from .plan import Part
from .sampling import Sampler

MAX_GRAPHS = 6  # trunk and draft for prompts and for single tokens, head, sampler


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
        self._trunks = {prefill: Trunk(layers, prefill) for prefill in (False, True)}
        for prefill, trunk in self._trunks.items():
            trunk.set_inputs(row, row, row, spread, *_view(prefill))
        self._head = head
        head.set_inputs(hidden, row)
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
        cells: list[nn.Cell] = [*self._trunks.values(), self._head, self._sampler, *self._drafts.values()]
        return sum(len(cell.compile_cache) for cell in cells)

    def hidden(self, part: Part, token_ids_P: IntArray) -> Tensor:
        """Hidden states of a part's tokens, on the device; writes the cache."""
        return self._trunks[part.prefill](Tensor(token_ids_P), *_where(part), *_tensors(part.view))

    def logits(self, hidden_PD: Tensor, rows_O: NDArray) -> tuple[Tensor, IntArray]:
        """Logits (left on the device) and greedy tokens of the given rows."""
        logits_OV, greedy_O = self._head(hidden_PD, Tensor(rows_O.astype(np.int32)))
        return logits_OV, greedy_O.asnumpy()

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
