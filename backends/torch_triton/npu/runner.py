"""StepBatch in, StepResult out, on an NPU. Steps run as they come; none is a recorded graph.

Shape letters as in `backends.base`; T tokens with padding.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....configs.schema import RunConfig
from ....models.errors import InputError
from ....models.holding import Holding
from ....models.sharding import check_divides, shards, stage_layers
from ....models.spec import ModelSpec
from ...base import StepBatch, StepResult, Weights, next_tokens, output_rows, stored_as
from ...limits import check_supported
from ..device import DTYPES, check_npu_kv_dtype, choose_npu_dtype
from ..gpu.room import blocks_that_fit, check_weights_fit
from ..rank import TorchRank
from ..replicas import Share, share_of, whole_result
from ..sampling import sample
from .model import Model
from .operators import Cache, choose_operators
from .step import make_step
from .weights import DeviceWeights


class NpuRunner:
    """``rank``'s part of the model; every rank takes every step."""

    def __init__(self, spec: ModelSpec, run: RunConfig, device: torch.device, rank: TorchRank | None = None):
        check_supported(spec, run)
        check_npu_kv_dtype(run)
        self._rank = rank or TorchRank()
        self._mesh = self._rank.mesh
        check_divides(spec, self._mesh.grid)
        self.spec = spec
        self.dtype = choose_npu_dtype(run, spec, {}, device)
        self.kv_dtype = "fp32" if self.dtype == "fp32" else "bf16"
        self.block_size = run.engine.block_size
        self.kv_blocks = 0
        self._run, self._device = run, device
        heads = spec.num_attention_heads // self._mesh.tp.size
        self._operators = choose_operators(spec, heads, self.block_size, device)
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        spec, run, mesh = self.spec, self._run, self._mesh
        stored = stored_as(run, weights)
        self.dtype = choose_npu_dtype(run, spec, stored, self._device)
        holding = Holding(self.dtype, stored)
        held = shards(spec, mesh.grid, mesh.rank, weights.has_mtp)
        check_weights_fit(spec, run, held, holding, self._device)
        source = DeviceWeights(spec, weights, DTYPES[self.kv_dtype], self._device, mesh, holding)
        self._has_mtp = source.has_mtp
        self._model: Model | None = Model(self._operators, source, run.engine.max_seq_len)
        layers = len(stage_layers(spec, mesh.grid, mesh.pp.index))
        layers += spec.num_nextn_predict_layers if source.has_mtp and mesh.is_last_stage else 0
        self._replica_blocks = self._rank.least(blocks_that_fit(spec, run, self.kv_dtype, layers, self._device))
        self.kv_blocks = mesh.dp.size * self._replica_blocks
        self._model.cache = self._empty_cache(layers)
        print(f"note: cache: {self._replica_blocks} blocks of {self.block_size} tokens", file=sys.stderr)

    def _empty_cache(self, layers: int) -> Cache:
        def zeros(width: int) -> Tensor:
            shape = layers, self._replica_blocks, self.block_size, 1, width
            return torch.zeros(shape, dtype=DTYPES[self.kv_dtype], device=self._device)

        return Cache(zeros(self.spec.kv_lora_rank), zeros(self.spec.qk_rope_head_dim))

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        if batch.draft and not self._has_mtp:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        share = share_of(batch, self._mesh, self._replica_blocks)
        return whole_result(share, self._step(share), self._mesh, self.spec.vocab_size)

    def close(self) -> None:
        self._model = None

    def _step(self, share: Share) -> StepResult | None:
        """This replica's outputs, on the last stage."""
        assert self._model is not None, "closed"
        model, batch, engine = self._model, share.batch, self._run.engine
        most_keys = max(engine.max_seq_len, engine.max_batch_tokens)
        step = make_step(batch, max(share.tokens), self.block_size, most_keys, self._device)
        stream = model.hidden(step)
        if not model.is_last_stage:
            return None
        rows, sequence_O, position_O = output_rows(batch)
        rows_O = self._on_device(rows)
        logits_OV = model.logits(stream.rows(rows_O))
        token_ids_O = self._sample(logits_OV, batch, sequence_O, position_O)
        draft_OV = None
        if batch.draft:
            next_T = np.zeros(len(step.token_ids_T), np.int64)
            next_T[: step.tokens] = next_tokens(batch, rows, token_ids_O)
            draft_OV = model.draft_logits(stream, self._on_device(next_T), rows_O, step)
        return StepResult(
            token_ids_O=token_ids_O,
            logits_OV=logits_OV.cpu().numpy() if batch.return_logits else None,
            draft_token_ids_O=None if draft_OV is None else draft_OV.argmax(dim=1).int().cpu().numpy(),
            draft_logits_OV=draft_OV.cpu().numpy() if draft_OV is not None and batch.return_logits else None,
        )

    def _sample(
        self, logits_OV: Tensor, batch: StepBatch, sequence_O: NDArray[np.int64], position_O: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """The sampled token of each output, on the host."""
        chosen = batch.sampling
        by_output = (
            values_B[sequence_O].astype(dtype)
            for values_B, dtype in (
                (chosen.temperature_B, np.float32),
                (chosen.top_k_B, np.int64),
                (chosen.top_p_B, np.float32),
                (chosen.seed_B, np.int64),
            )
        )
        numbers = (self._on_device(values) for values in (position_O.astype(np.int64), *by_output))
        return sample(logits_OV, *numbers).int().cpu().numpy()

    def _on_device(self, values: NDArray) -> Tensor:
        return torch.from_numpy(values).to(self._device)
