"""The forward pass: embedding, blocks, head, and the multi-token-prediction (MTP) layer.

Shape letters: T tokens, O outputs, D hidden, V vocabulary, P rotated pairs (half the rope dim), L layers, B cache
blocks, S slots of a block, X cache entry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.rope import rope_tables
from ...models.spec import ModelSpec
from .attention import Attention
from .layers import Linear, RMSNorm, SwiGLU
from .moe import MoE
from .plan import Plan
from .weights import TensorSource


class Model:
    """The main model and, when the weights have one, the MTP layer. ``cache_LBSX`` is written by every step."""

    def __init__(self, spec: ModelSpec, source: TensorSource, cache_LBSX: Tensor, max_positions: int):
        self._cache_LBSX = cache_LBSX
        cos, sin = rope_tables(spec, max_positions)
        self._turn_SP = torch.complex(torch.from_numpy(cos), torch.from_numpy(sin))
        self.embed_tokens_VD = source.read("model.embed_tokens.weight")
        self.blocks = [Block(spec, source, layer) for layer in range(spec.num_hidden_layers)]
        self.norm = RMSNorm(source.read("model.norm.weight"), spec.rms_norm_eps)
        self.head = Head(source, "lm_head.weight")
        self.mtp = MTP(spec, source) if source.has_mtp else None

    def hidden(self, token_ids_T: Tensor, plan: Plan) -> Tensor:
        """Hidden states [T, D] before the final norm."""
        x_TD = F.embedding(token_ids_T, self.embed_tokens_VD)
        turn_TP = self._turn_SP[plan.positions_T]
        for block, cache_BSX in zip(self.blocks, self._cache_LBSX, strict=False):
            x_TD = block(x_TD, turn_TP, cache_BSX, plan)
        return x_TD

    def logits(self, hidden_OD: Tensor) -> Tensor:
        """float32 [O, V] from hidden states before the final norm."""
        return self.head(self.norm(hidden_OD))

    def draft_logits(self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, plan: Plan) -> Tensor:
        """float32 [O, V] for the token after the next of rows ``rows_O``; the MTP layer's cache gets all T."""
        assert self.mtp is not None, "the runner refuses drafts without an MTP layer"
        if self.mtp.after_norm:
            hidden_TD = self.norm(hidden_TD)
        turn_TP = self._turn_SP[plan.positions_T]
        return self.mtp(hidden_TD, next_ids_T, rows_O, turn_TP, self._cache_LBSX[len(self.blocks)], plan)


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, spec: ModelSpec, source: TensorSource, layer: int):
        prefix = f"model.layers.{layer}"
        self.input_norm = RMSNorm(source.read(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        self.attention = Attention(spec, source, f"{prefix}.self_attn")
        self.mlp_norm = RMSNorm(source.read(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        self.mlp = MoE(spec, source, f"{prefix}.mlp") if spec.is_moe(layer) else SwiGLU(source, f"{prefix}.mlp")

    def __call__(self, x_TD: Tensor, turn_TP: Tensor, cache_BSX: Tensor, plan: Plan) -> Tensor:
        x_TD = x_TD + self.attention(self.input_norm(x_TD), turn_TP, cache_BSX, plan)
        return (x_TD + self.mlp(self.mlp_norm(x_TD))).to(x_TD.dtype)  # a mixture of experts adds in FP32


class Head:
    """The output projection. Its matrix is held in FP32: a product of BF16 matrices would round the logits to BF16."""

    def __init__(self, source: TensorSource, name: str):
        self.matrix = Linear(source.read(name, torch.float32))

    def __call__(self, normed_OD: Tensor) -> Tensor:
        return self.matrix(normed_OD.float())


class MTP:
    """Predicts the token after the next from a hidden state and the next token (DeepSeek-V3 section 2.2)."""

    def __init__(self, spec: ModelSpec, source: TensorSource):
        layer = spec.num_hidden_layers
        prefix = f"model.layers.{layer}"
        self.after_norm = spec.mtp_hidden == "post_norm"
        self.embed_tokens_VD = source.read(f"{prefix}.embed_tokens.weight")
        self.embedding_norm = RMSNorm(source.read(f"{prefix}.enorm.weight"), spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(source.read(f"{prefix}.hnorm.weight"), spec.rms_norm_eps)
        self.projection = Linear(source.read(f"{prefix}.eh_proj.weight"))
        self.block = Block(spec, source, layer)
        self.norm = RMSNorm(source.read(f"{prefix}.shared_head.norm.weight"), spec.rms_norm_eps)
        self.head = Head(source, f"{prefix}.shared_head.head.weight")

    def __call__(
        self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, turn_TP: Tensor, cache_BSX: Tensor, plan: Plan
    ) -> Tensor:
        embedding_TD = F.embedding(next_ids_T, self.embed_tokens_VD)
        joined = torch.cat([self.embedding_norm(embedding_TD), self.hidden_norm(hidden_TD)], dim=1)
        x_TD = self.block(self.projection(joined), turn_TP, cache_BSX, plan)
        return self.head(self.norm(x_TD[rows_O]))
