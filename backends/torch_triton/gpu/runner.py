"""StepBatch in, StepResult out, on a GPU: decode steps are recorded graphs, and so are steps with prompts in sizes that
come again; others run as they come.

All ranks take every step, and all replicas of the model the same number of rows, however few sequences are their own:
what is exchanged has then sizes that a recorded graph can hold.

Shape letters as in `backends.base`; T tokens with padding, O outputs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ....configs.schema import RunConfig
from ....models.errors import InputError
from ....models.holding import Holding, check_groups
from ....models.sharding import check_divides, shards, stage_layers
from ....models.spec import ModelSpec
from ...base import IntArray, Pending, StepBatch, StepResult, Weights, next_tokens, output_rows, stored_as
from ...limits import check_supported
from ...working import expanded_positions
from ..cache import empty_cache
from ..device import choose_gpu_dtype, choose_gpu_kv_dtype
from ..rank import TorchRank
from ..replicas import Share, share_of, whole_result
from .graphs import DecodeSteps, MixedSteps, Recorder
from .inputs import Step, mixed_step, same_queries, sampling_numbers
from .loader import Loader
from .logits import Logits
from .model import Model, Stream
from .recorded import Started, Tokens
from .room import blocks_that_fit, check_weights_fit
from .sampling import Draw, draw, draw_of
from .source import SEED, DeviceTensors, DrawnTensors, StoredTensors
from .symmetric import connect


class GpuRunner:
    """``rank``'s part of the model; every rank takes every step."""

    def __init__(self, spec: ModelSpec, run: RunConfig, device: torch.device, rank: TorchRank | None = None):
        check_supported(spec, run)
        self._rank = rank or TorchRank()
        self._mesh = self._rank.mesh
        check_divides(spec, self._mesh.grid)
        self.spec = spec
        self.dtype = choose_gpu_dtype(run, spec, {})
        self.kv_dtype = choose_gpu_kv_dtype(run)
        self.block_size = run.engine.block_size
        self.kv_blocks = 0
        self._run = run
        self._device = device
        _check_shapes(spec)
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)  # where kernels are launched
            connect(self._rank, device)

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        run, spec = self._run, self.spec
        stored = stored_as(run, weights)
        self.dtype = choose_gpu_dtype(run, spec, stored)
        holding = Holding(self.dtype, stored)
        self._check_parts(weights.has_mtp, holding)
        source = self._source(weights)
        self._has_mtp = source.has_mtp
        layers = len(stage_layers(spec, self._mesh.grid, self._mesh.pp.index))
        layers += spec.num_nextn_predict_layers if source.has_mtp and self._mesh.is_last_stage else 0
        loader = Loader(spec, source, holding)
        tokens = max(run.engine.max_batch_tokens, 8 * run.engine.max_batch)
        self._model: Model | None = Model(loader, run.engine.max_seq_len, tokens)
        self._replica_blocks = self._rank.least(blocks_that_fit(spec, run, self.kv_dtype, layers, self._device))
        self.kv_blocks = self._mesh.dp.size * self._replica_blocks
        cache_LCZE = empty_cache(spec, self.kv_dtype, layers, self._replica_blocks, self.block_size, self._device)
        self._model.cache_LCZE = cache_LCZE
        held = f"{self._replica_blocks} blocks of {self.block_size} tokens in {self.kv_dtype}"
        held += f", {cache_LCZE.nbytes / 2**30:.1f} GiB"
        print(f"note: cache: {held}", file=sys.stderr)
        recorder = Recorder(self._model, run, self._device)
        self._decode = DecodeSteps(recorder, run.engine.max_batch)
        self._mixed_steps = MixedSteps(recorder, run)

    def _check_parts(self, mtp: bool, holding: Holding) -> None:
        """Refuse what no device could hold, before anything is read."""
        held = list(shards(self.spec, self._mesh.grid, self._mesh.rank, mtp))
        check_groups(held, holding)
        check_weights_fit(self.spec, self._run, held, holding, self._device)

    def _source(self, weights: Weights) -> DeviceTensors:
        if self._run.model.weights == "random":
            return DrawnTensors(self.spec, SEED, self._device, self._mesh)
        return StoredTensors(self.spec, weights, self._device, self._mesh)

    @property
    def starts_ahead(self) -> bool:
        """Where every rank has all outputs on its own device."""
        return self._mesh.dp.size == self._mesh.pp.size == 1

    def step(self, batch: StepBatch) -> StepResult:
        return self.start(batch).result()

    @torch.inference_mode()
    def start(self, batch: StepBatch) -> Pending:
        """Steps whose tokens are all that is asked for are queued where every rank has them; others have run when this
        returns.
        """
        if batch.draft and not self._has_mtp:
            raise InputError("no MTP layer", "draft", "use a checkpoint that has one, or do not ask for drafts")
        share = share_of(batch, self._mesh, self._replica_blocks)
        queries = None if batch.draft else same_queries(batch)
        how = draw_of(batch.sampling)
        if queries is None:
            return self._start_mixed(share, how)
        started = self._decode.start(share.batch, max(share.tokens) // queries, queries, how)
        if self.starts_ahead and not batch.return_logits:
            return Queued(started)
        return Done(whole_result(share, self._decoded(share, started), self._mesh, self.spec.vocab_size))

    def _start_mixed(self, share: Share, how: Draw) -> Pending:
        batch = share.batch
        if not self.starts_ahead or batch.draft or batch.return_logits:
            return Done(whole_result(share, self._mixed(share, how), self._mesh, self.spec.vocab_size))
        return Queued(self._mixed_steps.start(batch, how) or self._queue_mixed(share, how))

    @torch.inference_mode()
    def experts_hit(self, batch: StepBatch) -> list[int]:
        """See `base.CountsExperts`."""
        assert self._model is not None, "closed"
        spec, mesh = self.spec, self._mesh
        share = share_of(batch, mesh, self._replica_blocks)
        step = self._mixed_step(share.batch, max(share.tokens))
        row_T = torch.arange(len(step.token_ids_T), device=self._device)
        is_token_S = torch.cat([row_T < count for count in share.tokens])  # and not padding, of each replica
        hit_L = torch.zeros(spec.num_hidden_layers, device=self._device)
        own = [layer for layer in stage_layers(spec, mesh.grid, mesh.pp.index) if spec.is_moe(layer)]
        for layer, ids_SP in zip(own, self._model.routed(step), strict=True):
            hit_L[layer] = len(ids_SP[is_token_S, : spec.num_experts_per_tok].unique())
        hit_L = mesh.pp.total(hit_L)
        return [int(hit) for layer, hit in enumerate(hit_L.tolist()) if spec.is_moe(layer)]

    def close(self) -> None:
        self._model = None
        del self._decode, self._mixed_steps

    def _decoded(self, share: Share, started: Started) -> StepResult | None:
        """This replica's outputs, on the last stage."""
        if not self._mesh.is_last_stage:
            return None
        kept_OV = started.logits_OV
        logits_OV = None if kept_OV is None else kept_OV[: started.outputs].cpu().numpy()
        return StepResult(started.token_ids_O(), logits_OV)

    def _queue_mixed(self, share: Share, how: Draw) -> Started:
        """A step that is not recorded. What it works in is only used again by launches that follow its own."""
        forward = self._forward(share, how)
        return Started(Tokens.copied(forward.token_ids_O), len(forward.token_ids_O))

    def _mixed(self, share: Share, how: Draw) -> StepResult | None:
        """This replica's outputs, on the last stage."""
        batch = share.batch
        forward = self._forward(share, how)
        if forward.stream is None:
            return None
        token_ids = np.array(forward.token_ids_O.cpu())  # the next step overwrites them
        drafts = self._drafts(forward, batch, token_ids) if batch.draft else None
        shows = batch.return_logits
        return StepResult(
            token_ids_O=token_ids,
            logits_OV=_on_host(forward.logits, self.spec.vocab_size) if shows else None,
            draft_token_ids_O=None if drafts is None else drafts.best().cpu().numpy(),
            draft_logits_OV=_on_host(drafts, self.spec.vocab_size) if drafts is not None and shows else None,
        )

    def _forward(self, share: Share, how: Draw) -> _Forward:
        assert self._model is not None, "closed"
        model, batch = self._model, share.batch
        step = self._mixed_step(batch, max(share.tokens))
        assert step.rows_O is not None, "the host knows them"
        numbers = sampling_numbers(batch, self._device) if how is not Draw.GREEDY else None
        stream = model.hidden(step)
        drawn_O = model.last_O[: len(step.rows_O)]
        if not model.is_last_stage:
            return _Forward(step, None, None, drawn_O)
        logits = None
        if len(drawn_O):
            logits = model.logits(stream.rows(step.rows_O))
            if batch.return_logits:
                logits = logits.joined()
            draw(logits, numbers, how, drawn_O)
        return _Forward(step, stream, logits, drawn_O)

    def _drafts(self, forward: _Forward, batch: StepBatch, token_ids_O: IntArray) -> Logits:
        model, step, stream = self._model, forward.step, forward.stream
        assert model is not None and stream is not None and step.rows_O is not None, "the last stage's"
        next_T = np.zeros(len(step.token_ids_T), np.int32)
        next_T[: len(batch.token_ids_T)] = next_tokens(batch, output_rows(batch)[0], token_ids_O)
        drafts = model.draft_logits(stream, torch.from_numpy(next_T).to(self._device), step.rows_O, step)
        return drafts.joined() if batch.return_logits else drafts

    def _mixed_step(self, batch: StepBatch, tokens: int) -> Step:
        run, longest = self._run, self._run.engine.max_seq_len
        return mixed_step(batch, tokens, self.block_size, longest, expanded_positions(run), self._device)


class _Forward(NamedTuple):
    """What a step that runs as it comes leaves on the device: a stream on the last stage, logits if it has outputs."""

    step: Step
    stream: Stream | None
    logits: Logits | None
    token_ids_O: torch.Tensor


def _on_host(logits: Logits | None, vocab_size: int) -> NDArray[np.float32]:
    return np.empty((0, vocab_size), np.float32) if logits is None else logits.part_OP.cpu().numpy()


@dataclass(frozen=True)
class Queued:
    started: Started

    def result(self) -> StepResult:
        return StepResult(self.started.token_ids_O())


@dataclass(frozen=True)
class Done:
    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


def _check_shapes(spec: ModelSpec) -> None:
    for name in ("hidden_size", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
        if getattr(spec, name) % 8:
            raise InputError(f"{name} {getattr(spec, name)} is not a multiple of 8", "device", "set it to cpu")
