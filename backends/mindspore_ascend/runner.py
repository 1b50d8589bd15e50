"""StepBatch in, StepResult out: numpy at the seam, MindSpore graphs below it.

Shape letters as in `backends.base`; P tokens of a part, Q outputs of a part.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.sharding import Grid, check_divides, shards
from ...models.spec import ModelSpec
from ..base import FloatArray, IntArray, Rank, StepBatch, StepResult, Weights, next_tokens, output_rows
from ..limits import cache_blocks, check_supported
from ..memory import check_memory
from .device import CPU, DTYPES, choose_device, choose_dtype, native_dtype
from .graphs import Graphs
from .model import MTP, Head, Layers
from .ops import op_set
from .plan import Part, make_parts
from .weights import RankWeights, rank_bytes


class MindSporeRunner:
    def __init__(self, spec: ModelSpec, run: RunConfig, rank: Rank):
        check_supported(spec, run)
        self._device = choose_device(run)
        self.dtype, self.kv_dtype = choose_dtype(run, self._device), native_dtype(self._device)
        self._grid = Grid(tp=run.parallel.tp, ep=run.parallel.ep)
        check_divides(spec, self._grid)
        self.spec = spec
        self.block_size = run.engine.block_size
        self.kv_blocks = cache_blocks(run)
        self._rank = rank
        self._positions = run.engine.max_seq_len
        self._ops = op_set(self._device)

    def load(self, weights: Weights) -> None:
        spec, dtype, operators = self.spec, DTYPES[self.kv_dtype], self._ops
        has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        if self._device == CPU:
            self._check_host_memory(has_mtp, dtype)
        source = RankWeights(spec, weights, self._grid, self._rank.rank, dtype, int8=self.dtype == "w8a8")
        layers = Layers(source, operators, self._positions, self.kv_blocks, self.block_size)
        head = Head(source, operators)
        mtp = MTP(source, operators, head, self.kv_blocks, self.block_size) if has_mtp else None
        self.graphs: Graphs | None = Graphs(spec, layers, head, mtp, dtype)

    def step(self, batch: StepBatch) -> StepResult:
        assert self.graphs is not None, "closed"
        if batch.draft and not self.graphs.has_drafts:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        outputs = Outputs(batch, self.spec.vocab_size)
        for part in make_parts(batch, self.block_size, self._ops.PREFILL_TOKENS):
            _run(self.graphs, batch, part, outputs)
        return outputs.result()

    def close(self) -> None:
        self.graphs = None

    def _check_host_memory(self, has_mtp: bool, dtype: ms.Type) -> None:
        spec = self.spec
        held = list(shards(spec, self._grid, self._rank.rank, mtp=has_mtp))
        layers = spec.num_hidden_layers + (spec.num_nextn_predict_layers if has_mtp else 0)
        cache_bytes = 4 * math.prod((layers, self.kv_blocks, self.block_size, spec.latent_dim))
        what = f"{self.dtype} weights and cache of {self.kv_blocks * self.block_size} tokens"
        check_memory(self._grid.world_size * (rank_bytes(held, dtype, self.dtype == "w8a8") + cache_bytes), what)


class Outputs:
    """The outputs of a step, filled part by part."""

    def __init__(self, batch: StepBatch, vocab_size: int):
        self.rows_O, self.sequence_O, self.position_O = output_rows(batch)
        count, sampling = len(self.rows_O), batch.sampling
        self.token_ids_O = np.zeros(count, np.int32)
        self.draft_ids_O = np.zeros(count, np.int32) if batch.draft else None
        shape = count, vocab_size
        self.logits_OV: FloatArray | None = np.zeros(shape, np.float32) if batch.return_logits else None
        self.draft_logits_OV = np.zeros(shape, np.float32) if batch.return_logits and batch.draft else None
        self._temperature_O = sampling.temperature_B[self.sequence_O]
        self._filters_O = sampling.top_k_B[self.sequence_O], sampling.top_p_B[self.sequence_O]
        self._seed_O = sampling.seed_B[self.sequence_O].view(np.int32)

    def of(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The outputs that a part computes, and their rows in it."""
        chosen_Q = np.flatnonzero(np.isin(self.rows_O, part.rows_P))
        return chosen_Q, np.searchsorted(part.rows_P, self.rows_O[chosen_Q])

    def sample(self, graphs: Graphs, chosen_Q: NDArray[np.int64], logits_QV: Tensor, greedy_Q: IntArray) -> None:
        temperature_Q = self._temperature_O[chosen_Q]
        if not temperature_Q.any():
            self.token_ids_O[chosen_Q] = greedy_Q
            return
        top_k_Q, top_p_Q = (values_O[chosen_Q] for values_O in self._filters_O)
        numbers = greedy_Q, self.position_O[chosen_Q], temperature_Q, top_k_Q, top_p_Q, self._seed_O[chosen_Q]
        self.token_ids_O[chosen_Q] = graphs.sample(logits_QV, *numbers)

    def result(self) -> StepResult:
        return StepResult(self.token_ids_O, self.logits_OV, self.draft_ids_O, self.draft_logits_OV)


def _run(graphs: Graphs, batch: StepBatch, part: Part, outputs: Outputs) -> None:
    """One part of a step: its tokens into the cache, its outputs into ``outputs``."""
    hidden_PD = graphs.hidden(part, batch.token_ids_T[part.rows_P])
    chosen_Q, rows_Q = outputs.of(part)
    if len(chosen_Q):
        logits_QV, greedy_Q = graphs.logits(hidden_PD, rows_Q)
        outputs.sample(graphs, chosen_Q, logits_QV, greedy_Q)
        if outputs.logits_OV is not None:
            outputs.logits_OV[chosen_Q] = logits_QV.asnumpy()
    if outputs.draft_ids_O is None:
        return
    next_ids_P = next_tokens(batch, outputs.rows_O, outputs.token_ids_O)[part.rows_P]
    # Without outputs the layer still writes its cache; the head then sees a row that nobody asked for.
    logits_RV, greedy_R = graphs.draft(part, hidden_PD, next_ids_P, rows_Q if len(rows_Q) else np.zeros(1, np.int64))
    outputs.draft_ids_O[chosen_Q] = greedy_R[: len(chosen_Q)]
    if outputs.draft_logits_OV is not None:
        outputs.draft_logits_OV[chosen_Q] = logits_RV[: len(chosen_Q)]
