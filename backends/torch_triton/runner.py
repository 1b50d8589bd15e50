"""StepBatch in, StepResult out: numpy at the seam, PyTorch below it.

Shape letters as in `backends.base`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...configs.schema import RunConfig
from ...models.costs import cache_bytes
from ...models.errors import InputError
from ...models.sharding import check_divides, stage_layers
from ...models.spec import ModelSpec
from ..base import FloatArray, IntArray, StepBatch, StepResult, Weights, next_tokens, output_rows
from ..limits import cache_blocks, check_supported
from ..memory import check_memory
from .cache import check_cache, empty_cache
from .device import DTYPES, choose_dtype, choose_kv_dtype
from .model import Model
from .plan import Plan, make_plan
from .rank import TorchRank
from .replicas import Share, share_of, whole_result
from .sampling import sample
from .weights import TensorSource, weight_bytes


class TorchRunner:
    def __init__(self, spec: ModelSpec, run: RunConfig, rank: TorchRank):
        check_supported(spec, run)
        check_divides(spec, rank.mesh.grid)
        self.spec = spec
        self._rank = rank
        self._mesh = rank.mesh
        self.dtype = choose_dtype(run)
        self.kv_dtype = choose_kv_dtype(run, self.dtype)
        check_cache(spec, self.kv_dtype)
        self.block_size = run.engine.block_size
        self._replica_blocks = cache_blocks(run, self._mesh.dp.size)
        self.kv_blocks = self._mesh.dp.size * self._replica_blocks
        self._max_positions = run.engine.max_seq_len

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        spec, dtype = self.spec, DTYPES[self.dtype]
        source = TensorSource(spec, weights, dtype, self._mesh)
        layers = len(stage_layers(spec, self._mesh.grid, self._mesh.pp.index))
        layers += spec.num_nextn_predict_layers if source.has_mtp and self._mesh.is_last_stage else 0
        cached = layers * self._replica_blocks * self.block_size
        self._check_memory(weight_bytes(source.held, dtype) + cached * cache_bytes(spec, self.kv_dtype))
        self._has_mtp = source.has_mtp
        cache = empty_cache(spec, self.kv_dtype, layers, self._replica_blocks, self.block_size)
        self._model: Model | None = Model(spec, source, cache, self._max_positions)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        if batch.draft and not self._has_mtp:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        share = share_of(batch, self._mesh, self._replica_blocks)
        return whole_result(share, self._step(share), self._mesh, self.spec.vocab_size)

    def close(self) -> None:
        self._model = None

    def _check_memory(self, own_bytes: int) -> None:
        """Every rank looks before any of this machine's ranks, which hold about the same, takes its part."""
        what = f"{self.dtype} weights and {self.kv_dtype} cache of {self.kv_blocks * self.block_size} tokens"
        check_memory(self._rank.local_ranks * own_bytes, what)
        self._rank.barrier()

    def _step(self, share: Share) -> StepResult | None:
        """This replica's outputs, on the last stage."""
        assert self._model is not None, "closed"
        batch = share.batch
        plan = make_plan(batch, self.block_size, DTYPES[self.dtype], share.tokens)
        hidden_TD = self._model.hidden(torch.from_numpy(batch.token_ids_T), plan)
        if not self._mesh.is_last_stage:
            return None
        rows_O, sequence_O, position_O = output_rows(batch)
        logits_OV = self._model.logits(hidden_TD[torch.from_numpy(rows_O)])
        token_ids_O = _sample(logits_OV, batch, sequence_O, position_O)
        draft_OV = self._draft(batch, hidden_TD, rows_O, token_ids_O, plan) if batch.draft else None
        return StepResult(
            token_ids_O=token_ids_O,
            logits_OV=logits_OV.numpy() if batch.return_logits else None,
            draft_token_ids_O=None if draft_OV is None else draft_OV.argmax(dim=1).int().numpy(),
            draft_logits_OV=draft_OV.numpy() if draft_OV is not None and batch.return_logits else None,
        )

    def _draft(
        self, batch: StepBatch, hidden_TD: Tensor, rows_O: NDArray[np.int64], token_ids_O: IntArray, plan: Plan
    ) -> Tensor:
        assert self._model is not None, "closed"
        next_T = torch.from_numpy(next_tokens(batch, rows_O, token_ids_O))
        return self._model.draft_logits(hidden_TD, next_T, torch.from_numpy(rows_O), plan)


def _sample(logits_OV: Tensor, batch: StepBatch, sequence_O: NDArray[np.int64], position_O: IntArray) -> IntArray:
    """The sampled token of each output."""
    chosen = batch.sampling

    def by_output(values_B: IntArray | FloatArray | NDArray[np.uint32], dtype: type) -> Tensor:
        return torch.from_numpy(values_B[sequence_O].astype(dtype))

    token_ids_O = sample(
        logits_OV,
        torch.from_numpy(position_O.astype(np.int64)),
        by_output(chosen.temperature_B, np.float32),
        by_output(chosen.top_k_B, np.int64),
        by_output(chosen.top_p_B, np.float32),
        by_output(chosen.seed_B, np.int64),
    )
    return token_ids_O.int().numpy()
