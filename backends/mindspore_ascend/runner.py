"""StepBatch in, StepResult out: numpy at the seam, MindSpore graphs below it.

Shape letters as in `backends.base`; P tokens of a part, Q outputs of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.holding import stored_dtype
from ...models.sharding import check_divides, shards
from ...models.spec import ModelSpec
from ..base import FloatArray, IntArray, StepBatch, StepResult, Weights, next_tokens, output_rows, stored_as
from ..limits import cache_blocks, check_supported
from ..memory import check_memory
from ..shares import Share, share_of
from .device import CPU, DTYPES, choose_device, choose_dtype, native_dtype
from .graphs import Graphs
from .mesh import Mesh
from .model import MTP, Head, Layers
from .ops import OpSet, op_set
from .plan import DECODE_QUERIES, Part, make_parts, make_shared_parts, rooms_of
from .rank import MindSporeRank
from .weights import RankWeights, rank_bytes


class MindSporeRunner:
    def __init__(self, spec: ModelSpec, run: RunConfig, rank: MindSporeRank):
        check_supported(spec, run)
        self._device = choose_device(run)
        self._run = run
        self.dtype = choose_dtype(run, self._device, stored_dtype(spec, {}))
        self.kv_dtype = native_dtype(self._device)
        check_divides(spec, rank.mesh.grid)
        self._ops = op_set(self._device)
        self._mesh = _sending_if_possible(rank.mesh, spec, run, self._ops)
        self.spec = spec
        self.block_size = run.engine.block_size
        self._replica_blocks = cache_blocks(run, self._mesh.dp.size)
        self.kv_blocks = self._mesh.dp.size * self._replica_blocks
        self._rank = rank
        self._positions = run.engine.max_seq_len

    def load(self, weights: Weights) -> None:
        spec, dtype, operators = self.spec, DTYPES[self.kv_dtype], self._ops
        self.dtype = choose_dtype(self._run, self._device, stored_dtype(spec, stored_as(self._run, weights)))
        has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        if self._device == CPU:
            self._check_host_memory(has_mtp, dtype)
        source = RankWeights(spec, weights, self._mesh, dtype, int8=self.dtype == "w8a8")
        blocks = self._cached_blocks
        layers = Layers(source, operators, self._positions, blocks, self.block_size)
        head = Head(source, operators)
        mtp = MTP(source, operators, head, blocks, self.block_size) if has_mtp else None
        self.graphs: Graphs | None = Graphs(spec, layers, head, mtp, dtype, self._mesh.dp.size)

    def step(self, batch: StepBatch) -> StepResult:
        assert self.graphs is not None, "closed"
        if batch.draft and not self.graphs.has_drafts:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        share = share_of(batch, self._mesh.dp.size, self._mesh.dp.index, self._replica_blocks)
        outputs = Outputs(share.batch, self.spec.vocab_size)
        for part in self._parts(batch, share):
            _run(self.graphs, share.batch, part, outputs)
        return outputs.result() if self._mesh.dp.size == 1 else self._whole(outputs.result(), share)

    def _parts(self, batch: StepBatch, share: Share) -> Iterator[Part]:
        own = make_parts(share.batch, self.block_size, self._ops.PREFILL_TOKENS)
        if self._mesh.dp.size == 1:
            return own
        rooms = rooms_of(batch.query_lens_B, share.replica_B, self._mesh.grid, self._ops.PREFILL_TOKENS)
        return make_shared_parts(own, rooms, self._replica_blocks * self.block_size)

    def _whole(self, own: StepResult, share: Share) -> StepResult:
        """The result of all replicas, on every rank; the first rank of a replica speaks for it."""
        is_own_O = share.replica_O == (self._mesh.dp.index if self._mesh.tp.index == 0 else -1)

        def whole(own_Q: NDArray) -> NDArray:
            room_O = np.zeros((len(is_own_O), *own_Q.shape[1:]), own_Q.dtype)
            room_O[is_own_O] = own_Q[: is_own_O.sum()]
            return self._rank.joined(room_O)

        return StepResult(**{name: whole(values) for name, values in vars(own).items() if values is not None})

    def close(self) -> None:
        self.graphs = None

    @property
    def _cached_blocks(self) -> int:
        """With replicas, one more than the engine counts: tokens of idle parts are written somewhere."""
        return self._replica_blocks + (self._mesh.dp.size > 1)

    def _check_host_memory(self, has_mtp: bool, dtype: ms.Type) -> None:
        spec = self.spec
        held = list(shards(spec, self._mesh.grid, self._mesh.rank, mtp=has_mtp))
        layers = spec.num_hidden_layers + (spec.num_nextn_predict_layers if has_mtp else 0)
        cache_bytes = 4 * math.prod((layers, self._cached_blocks, self.block_size, spec.latent_dim))
        what = f"{self.dtype} weights and cache of {self.kv_blocks * self.block_size} tokens"
        check_memory(self._rank.world_size * (rank_bytes(held, dtype, self.dtype == "w8a8") + cache_bytes), what)


def _sending_if_possible(mesh: Mesh, spec: ModelSpec, run: RunConfig, operators: OpSet) -> Mesh:
    """``mesh`` without the group that tokens are sent between, if the operators do not take what a rank may send."""
    rows = -(-DECODE_QUERIES * run.engine.max_batch // mesh.tp.size)
    if mesh.ep is None or operators.can_dispatch(spec, mesh.ep.size, rows):
        return mesh
    return replace(mesh, ep=None)


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
    chosen_Q, rows_Q = outputs.of(part)
    count = len(chosen_Q)
    if not count:
        rows_Q = np.zeros(1, np.int64)  # the head then sees a row that nobody asked for
    hidden_PD, logits_QV, greedy_Q = graphs.forward(part, part.take(batch.token_ids_T), rows_Q)
    if count:
        outputs.sample(graphs, chosen_Q, logits_QV, greedy_Q)
        if outputs.logits_OV is not None:
            outputs.logits_OV[chosen_Q] = logits_QV.asnumpy()
    if outputs.draft_ids_O is None:
        return
    next_ids_P = part.take(next_tokens(batch, outputs.rows_O, outputs.token_ids_O))
    logits_QV, greedy_Q = graphs.draft(part, hidden_PD, next_ids_P, rows_Q)
    outputs.draft_ids_O[chosen_Q] = greedy_Q[:count]
    if outputs.draft_logits_OV is not None:
        outputs.draft_logits_OV[chosen_Q] = logits_QV[:count]
