"""StepBatch in, StepResult out, over `models.reference` and a paged cache in float32.

Shape letters as in `backends.base`; X is one cached entry (latent and rope key).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.params import parameters
from ...models.reference import LatentCache, ReferenceModel
from ...models.sampling import sample
from ...models.spec import ModelSpec
from ..base import FloatArray, IntArray, StepBatch, StepResult, Weights, next_tokens, output_rows
from ..limits import cache_blocks, check_supported
from ..memory import check_memory


class PagedSequence:
    """One sequence's view of the paged cache (a LatentCache)."""

    def __init__(self, cache_LPSX: FloatArray, table_M: IntArray, length: int):
        self.length = length
        self._cache_LPSX = cache_LPSX
        self._table_M = table_M

    def append(self, layer: int, entries_TX: FloatArray) -> FloatArray:
        block_size = self._cache_LPSX.shape[2]
        visible = self.length + len(entries_TX)
        table = self._table_M[: -(-visible // block_size)]
        positions = np.arange(self.length, visible)
        self._cache_LPSX[layer, table[positions // block_size], positions % block_size] = entries_TX
        return self._cache_LPSX[layer, table].reshape(-1, entries_TX.shape[1])[:visible]


class ReferenceRunner:
    dtype = kv_dtype = "fp32"

    def __init__(self, spec: ModelSpec, run: RunConfig):
        check_supported(spec, run)
        precisions = {run.dtype, run.engine.kv_dtype}
        if run.device not in ("auto", "cpu") or not precisions <= {"auto", "fp32"}:
            asked = f"device {run.device}, dtype {run.dtype}, kv_dtype {run.engine.kv_dtype}"
            raise InputError(asked, "reference backend", "it runs on the cpu in fp32")
        self.spec = spec
        self.block_size = run.engine.block_size
        self.kv_blocks = cache_blocks(run)
        self._max_positions = run.engine.max_seq_len
        layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
        self._cache_shape = (layers, self.kv_blocks, self.block_size, spec.latent_dim)

    def load(self, weights: Weights) -> None:
        table = {param.name: param for param in parameters(self.spec, mtp=weights.has_mtp)}
        needed = 4 * (sum(param.size for param in table.values()) + int(np.prod(self._cache_shape)))
        check_memory(needed, "float32 weights and cache of the reference backend")
        self.has_mtp = weights.has_mtp and self.spec.num_nextn_predict_layers > 0
        values = {}
        for name, param in table.items():
            values[name] = weights.read(name, "f32")
            if values[name].shape != param.shape:
                found, wanted = list(values[name].shape), list(param.shape)
                raise InputError(f"shape {found}", name, f"the model needs {wanted}")
        self._model = ReferenceModel(self.spec, values, self._max_positions)
        self._cache_LPSX: FloatArray = np.zeros(self._cache_shape, np.float32)

    def step(self, batch: StepBatch) -> StepResult:
        caches: list[LatentCache] = [
            PagedSequence(self._cache_LPSX, table, int(length))
            for table, length in zip(batch.block_tables_BM, batch.context_lens_B, strict=True)
        ]
        query_lens = batch.query_lens_B.tolist()
        hidden_TD = self._model.hidden(batch.token_ids_T, caches, query_lens)
        rows_O, sequence_O, position_O = output_rows(batch)
        logits_OV = self._model.logits(hidden_TD[rows_O])
        chosen = batch.sampling
        token_ids_O = sample(
            logits_OV,
            position_O,
            chosen.temperature_B[sequence_O],
            chosen.top_k_B[sequence_O],
            chosen.top_p_B[sequence_O],
            chosen.seed_B[sequence_O],
        )
        draft_OV = self._draft(batch, hidden_TD, caches, rows_O, token_ids_O) if batch.draft else None
        return StepResult(
            token_ids_O=token_ids_O,
            logits_OV=logits_OV if batch.return_logits else None,
            draft_token_ids_O=None if draft_OV is None else draft_OV.argmax(axis=1).astype(np.int32),
            draft_logits_OV=draft_OV if batch.return_logits else None,
        )

    def close(self) -> None:
        return None

    def _draft(
        self,
        batch: StepBatch,
        hidden_TD: FloatArray,
        caches: list[LatentCache],
        rows_O: NDArray[np.int64],
        token_ids_O: IntArray,
    ) -> FloatArray:
        if not self.has_mtp:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        next_T = next_tokens(batch, rows_O, token_ids_O)
        return self._model.mtp_logits(hidden_TD, next_T, caches, batch.query_lens_B.tolist())[rows_O]
