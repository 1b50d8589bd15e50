"""The forward pass with an NPU's operators; this rank's part of it.

A block's sublayer returns what is to be added to the residual stream (its "branch"); the next norm adds it.

Shape letters: T tokens with padding, O outputs, D hidden, V vocabulary, L layers, S positions, R rope dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.rope import rope_tables
from ....models.sharding import stage_layers
from ..model import Embedding
from .attention import Attention
from .moe import MoE, SwiGLU
from .operators import Cache, Operators
from .step import Step
from .weights import DeviceWeights, Piece

Turn = tuple[Tensor, Tensor]


class Stream(NamedTuple):
    """The residual stream, and a branch that has not been added to it yet; there is no residual before the first."""

    branch_TD: Tensor
    residual_TD: Tensor | None

    def sum(self) -> Tensor:
        return self.branch_TD if self.residual_TD is None else self.residual_TD + self.branch_TD

    def rows(self, rows_O: Tensor) -> Stream:
        return Stream(self.branch_TD[rows_O], None if self.residual_TD is None else self.residual_TD[rows_O])


class Norm:
    def __init__(self, operators: Operators, weight_D: Tensor, eps: float):
        self._operators, self._weight, self._eps = operators, weight_D, eps

    def __call__(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normed sum, and the sum."""
        if stream.residual_TD is None:
            return self._operators.rms_norm(stream.branch_TD, self._weight, self._eps), stream.branch_TD
        return self._operators.add_rms_norm(stream.branch_TD, stream.residual_TD, self._weight, self._eps)


class Model:
    """A pipeline stage's layers. The last stage has the head and, when the weights have one, the MTP layer.

    ``cache``, of this stage's layers [L, …], is written by every step: what fits beside the weights.
    """

    cache: Cache

    def __init__(self, operators: Operators, source: DeviceWeights, max_positions: int):
        spec, mesh = source.spec, source.mesh
        self._spec, self._device, self._dtype = spec, source.device, source.dtype
        self._stages = mesh.pp
        self.is_last_stage = mesh.is_last_stage
        # Both numbers of a pair turn by the same angle.
        cos_SR, sin_SR = (table.repeat(2, axis=1) for table in rope_tables(spec, max_positions))
        self._turn_SR = torch.from_numpy(cos_SR).to(source.device), torch.from_numpy(sin_SR).to(source.device)
        layers = stage_layers(spec, mesh.grid, mesh.pp.index)
        self._embedding = Embedding(source, "model.embed_tokens.weight") if mesh.is_first_stage else None
        self._blocks = [Block(operators, source, layer) for layer in layers]
        self._head = Head(operators, source, "model.norm.weight", "lm_head.weight") if mesh.is_last_stage else None
        self._mtp = MTP(operators, source) if mesh.is_last_stage and source.has_mtp else None

    def hidden(self, step: Step) -> Stream:
        """The stream after this stage's layers; the next stage is given its sum."""
        stream, turn = Stream(self._first(step), None), self._turn(step)
        for layer, block in enumerate(self._blocks):
            stream = block(stream, turn, self._cache_of(layer), step)
        if not self.is_last_stage:
            self._stages.send_on(stream.sum())
        return stream

    def _first(self, step: Step) -> Tensor:
        """What this stage begins with: the embedded tokens, or what the stage before sends."""
        if self._embedding is not None:
            return self._embedding(step.token_ids_T)
        shape = len(step.token_ids_T), self._spec.hidden_size
        return self._stages.receive(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _turn(self, step: Step) -> Turn:
        cos_SR, sin_SR = self._turn_SR
        return cos_SR[step.positions_T], sin_SR[step.positions_T]

    def _cache_of(self, layer: int) -> Cache:
        return Cache(self.cache.latent[layer], self.cache.rope[layer])

    def logits(self, stream: Stream) -> Tensor:
        """float32 [T, V]; asked of the last stage only."""
        assert self._head is not None, "the last stage has the head"
        return self._head(stream)

    def draft_logits(self, stream: Stream, next_ids_T: Tensor, rows_O: Tensor, step: Step) -> Tensor:
        """float32 [O, V] for the token after the next of rows ``rows_O``; the MTP layer's cache gets all T."""
        assert self._head is not None and self._mtp is not None, "the last stage has the MTP layer, where there is one"
        normed_TD, hidden_TD = self._head.norm(stream)
        if self._spec.mtp_hidden == "post_norm":
            hidden_TD = normed_TD
        cache = self._cache_of(len(self._blocks))
        return self._mtp(hidden_TD, next_ids_T, rows_O, self._turn(step), cache, step)


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x)); both are summed over the tensor-parallel ranks."""

    def __init__(self, operators: Operators, source: DeviceWeights, layer: int):
        spec, prefix = source.spec, f"model.layers.{layer}"
        self._ranks = source.mesh.tp
        feed_forward = MoE if spec.is_moe(layer) else SwiGLU
        self._input_norm = Norm(operators, source.read(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        self._attention = Attention(operators, source, f"{prefix}.self_attn")
        self._mlp_norm = Norm(operators, source.read(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        self._mlp = feed_forward(operators, source, f"{prefix}.mlp")

    def __call__(self, stream: Stream, turn: Turn, cache: Cache, step: Step) -> Stream:
        normed_TD, residual_TD = self._input_norm(stream)
        branch_TD = self._ranks.total(self._attention(normed_TD, turn, cache, step))
        normed_TD, residual_TD = self._mlp_norm(Stream(branch_TD, residual_TD))
        return Stream(self._ranks.total(self._mlp(normed_TD)), residual_TD)


class Head:
    """The last norm and the output projection, held in FP32 so that logits are not rounded to BF16."""

    def __init__(self, operators: Operators, source: DeviceWeights, norm: str, matrix: str):
        self._ranks = source.mesh.tp
        self.norm = Norm(operators, source.read(norm), source.spec.rms_norm_eps)
        self._matrix_VD = source.read(matrix, torch.float32)

    def __call__(self, stream: Stream) -> Tensor:
        normed_TD, _ = self.norm(stream)
        return self._ranks.beside(F.linear(normed_TD.float(), self._matrix_VD))


class MTP:
    """Predicts the token after the next from a hidden state and the next token (DeepSeek-V3 section 2.2)."""

    def __init__(self, operators: Operators, source: DeviceWeights):
        spec = source.spec
        prefix = f"model.layers.{spec.num_hidden_layers}"
        self._embedding = Embedding(source, f"{prefix}.embed_tokens.weight")
        self._embedding_norm, self._hidden_norm = (
            Norm(operators, source.read(f"{prefix}.{name}.weight"), spec.rms_norm_eps) for name in ("enorm", "hnorm")
        )
        self._projection = source.linear(operators, Piece(f"{prefix}.eh_proj.weight"))
        self._block = Block(operators, source, spec.num_hidden_layers)
        self._head = Head(operators, source, f"{prefix}.shared_head.norm.weight", f"{prefix}.shared_head.head.weight")

    def __call__(
        self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, turn: Turn, cache: Cache, step: Step
    ) -> Tensor:
        embedded_TD, _ = self._embedding_norm(Stream(self._embedding(next_ids_T), None))
        hidden_TD, _ = self._hidden_norm(Stream(hidden_TD, None))
        joined = torch.cat([embedded_TD, hidden_TD], dim=1)
        stream = self._block(Stream(self._projection(joined), None), turn, cache, step)
        return self._head(stream.rows(rows_O))
