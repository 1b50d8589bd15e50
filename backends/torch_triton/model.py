"""The forward pass: embedding, blocks, head, and the multi-token-prediction (MTP) layer; this rank's part of each.

Sums over the tensor-parallel ranks are taken once after attention and once after the feed-forward layer. The residual
stream is the same on all of them.

Shape letters: T tokens, O outputs, D hidden, V vocabulary, N rows of it on this rank, P rotated pairs (half the rope
dim), L layers, B cache blocks, S slots of a block, X cache entry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.rope import rope_tables
from ...models.sharding import stage_layers
from ...models.spec import ModelSpec
from .attention import Attention
from .layers import Linear, RMSNorm, SwiGLU
from .moe import MoE
from .plan import Plan
from .weights import TensorSource


class Model:
    """A pipeline stage's layers. The last stage has the head and, when the weights have one, the MTP layer.

    ``cache_LBSX``, of this stage's layers, is written by every step.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource, cache_LBSX: Tensor, max_positions: int):
        mesh = source.mesh
        self._stages = mesh.pp
        self._hidden_size = spec.hidden_size
        self._dtype = source.dtype
        self._cache_LBSX = cache_LBSX
        cos, sin = rope_tables(spec, max_positions)
        self._turn_SP = torch.complex(torch.from_numpy(cos), torch.from_numpy(sin))
        layers = stage_layers(spec, mesh.grid, mesh.pp.index)
        self.embedding = Embedding(source, "model.embed_tokens.weight") if mesh.is_first_stage else None
        self.blocks = [Block(spec, source, layer) for layer in layers]
        self.head = Head(spec, source, "model.norm.weight", "lm_head.weight") if mesh.is_last_stage else None
        self.mtp = MTP(spec, source) if mesh.is_last_stage and source.has_mtp else None

    def hidden(self, token_ids_T: Tensor, plan: Plan) -> Tensor:
        """Hidden states [T, D] after this stage's layers; the next stage is given them."""
        if self.embedding is not None:
            x_TD = self.embedding(token_ids_T)
        else:
            x_TD = self._stages.receive(torch.empty(len(token_ids_T), self._hidden_size, dtype=self._dtype))
        turn_TP = self._turn_SP[plan.positions_T]
        for block, cache_BSX in zip(self.blocks, self._cache_LBSX, strict=False):
            x_TD = block(x_TD, turn_TP, cache_BSX, plan)
        if self.head is None:
            self._stages.send_on(x_TD)
        return x_TD

    def logits(self, hidden_OD: Tensor) -> Tensor:
        """float32 [O, V] from hidden states before the final norm."""
        assert self.head is not None, "asked of the last stage only"
        return self.head(hidden_OD)

    def draft_logits(self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, plan: Plan) -> Tensor:
        """float32 [O, V] for the token after the next of rows ``rows_O``; the MTP layer's cache gets all T."""
        assert self.head is not None and self.mtp is not None, "asked of the last stage, when there is an MTP layer"
        if self.mtp.after_norm:
            hidden_TD = self.head.norm(hidden_TD)
        turn_TP = self._turn_SP[plan.positions_T]
        return self.mtp(hidden_TD, next_ids_T, rows_O, turn_TP, self._cache_LBSX[len(self.blocks)], plan)


class Embedding:
    """Rows of the table by token id. Each tensor-parallel rank has a range of them and gives zeros for the others."""

    def __init__(self, source: TensorSource, name: str):
        self._ranks = source.mesh.tp
        self._first = source.first_row(name)
        self.rows_ND = source.read(name)

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        if self._ranks.size == 1:
            return F.embedding(token_ids_T, self.rows_ND)
        row_T = token_ids_T - self._first
        here_T = (row_T >= 0) & (row_T < len(self.rows_ND))
        x_TD = F.embedding(row_T.where(here_T, 0), self.rows_ND)
        return self._ranks.total(x_TD.where(here_T[:, None], 0))


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, spec: ModelSpec, source: TensorSource, layer: int):
        prefix = f"model.layers.{layer}"
        self._ranks = source.mesh.tp
        self.input_norm = RMSNorm(source.read(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        self.attention = Attention(spec, source, f"{prefix}.self_attn")
        self.mlp_norm = RMSNorm(source.read(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        self.mlp = MoE(spec, source, f"{prefix}.mlp") if spec.is_moe(layer) else SwiGLU(source, f"{prefix}.mlp")

    def __call__(self, x_TD: Tensor, turn_TP: Tensor, cache_BSX: Tensor, plan: Plan) -> Tensor:
        if len(x_TD):  # a replica without tokens takes part in the experts only
            x_TD = x_TD + self._ranks.total(self.attention(self.input_norm(x_TD), turn_TP, cache_BSX, plan))
        return (x_TD + self._feed_forward(self.mlp_norm(x_TD), plan)).to(x_TD.dtype)  # experts add in FP32

    def _feed_forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        if isinstance(self.mlp, MoE):
            return self._ranks.total(self.mlp(x_TD, plan))
        return self._ranks.total(self.mlp(x_TD))


class Head:
    """The last norm and the output projection; each tensor-parallel rank has the rows of a range of tokens.

    Its matrix is held in FP32: a product of BF16 matrices would round the logits to BF16.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource, norm: str, matrix: str):
        self._ranks = source.mesh.tp
        self.norm = RMSNorm(source.read(norm), spec.rms_norm_eps)
        self.matrix = Linear(source.read(matrix, torch.float32))

    def __call__(self, hidden_OD: Tensor) -> Tensor:
        return self._ranks.beside(self.matrix(self.norm(hidden_OD).float()))


class MTP:
    """Predicts the token after the next from a hidden state and the next token (DeepSeek-V3 section 2.2)."""

    def __init__(self, spec: ModelSpec, source: TensorSource):
        layer = spec.num_hidden_layers
        prefix = f"model.layers.{layer}"
        self.after_norm = spec.mtp_hidden == "post_norm"
        self.embedding = Embedding(source, f"{prefix}.embed_tokens.weight")
        self.embedding_norm = RMSNorm(source.read(f"{prefix}.enorm.weight"), spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(source.read(f"{prefix}.hnorm.weight"), spec.rms_norm_eps)
        self.projection = Linear(source.read(f"{prefix}.eh_proj.weight"))
        self.block = Block(spec, source, layer)
        self.head = Head(spec, source, f"{prefix}.shared_head.norm.weight", f"{prefix}.shared_head.head.weight")

    def __call__(
        self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, turn_TP: Tensor, cache_BSX: Tensor, plan: Plan
    ) -> Tensor:
        embedding_TD = self.embedding(next_ids_T)
        joined = torch.cat([self.embedding_norm(embedding_TD), self.hidden_norm(hidden_TD)], dim=1)
        x_TD = self.block(self.projection(joined), turn_TP, cache_BSX, plan)
        return self.head(x_TD[rows_O])
