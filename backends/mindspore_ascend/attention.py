"""Multi-head latent attention: expanded for prompts, absorbed for single tokens, over one paged cache of latents.

Shape letters: T tokens, S keys, H heads of this rank, N nope dim, R rope dim, V value dim, C latent (kv_lora_rank), X =
C + R cache entry, Q = N + R query, A query latent, D hidden. Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from ...models.layouts.placement import deinterleaved, head_rows
from ...models.rope import softmax_scale
from ...models.spec import ModelSpec
from .layers import make_linear
from .ops import OpSet
from .parallel import SumOverRanks
from .weights import Piece, RankWeights


class Attention(nn.Cell):
    """MLA with its cache of ``blocks`` blocks. The result is the sum over ranks."""

    def __init__(self, source: RankWeights, op_set: OpSet, name: str, canonical: str, blocks: int, block_size: int):
        super().__init__(auto_prefix=False)
        spec = source.spec
        self.heads = spec.num_attention_heads // source.mesh.tp.size
        self.nope, self.rope, self.value = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim
        self.latent = spec.kv_lora_rank
        self.query_latent = spec.q_lora_rank or 0
        self._make_projections(source, op_set, name, canonical)
        self.rotate = op_set.Rotate(self.heads, self.nope, self.rope)
        self.write_cache, self.read_cache = op_set.WriteCache(), op_set.ReadCache()
        self.cache = source.zeros(f"{name}.key_cache", op_set.cache_shape(blocks, block_size, spec.latent_dim))
        scale = softmax_scale(spec)
        self.attend_prefill = op_set.PrefillAttention(self.heads, scale)
        self.attend_decode = op_set.DecodeAttention(self.heads, scale, self.latent, block_size)
        self.expand = ops.MatMul(transpose_b=True)
        self.absorb = ops.BatchMatMul()
        self.release = ops.BatchMatMul(transpose_b=True)
        self.total = SumOverRanks(source.mesh.tp)

    def _make_projections(self, source: RankWeights, op_set: OpSet, name: str, canonical: str) -> None:
        spec, eps = source.spec, source.spec.latent_norm_eps
        latent = Piece(f"{canonical}.kv_a_proj_with_mqa.weight", _latent_rows(spec))
        query_rows = _query_rows(spec, self.heads)
        if self.query_latent:
            pieces = Piece(f"{canonical}.q_a_proj.weight"), latent
            self.down = make_linear(source, op_set, f"{name}.qkv2l", *pieces)
            self.query_norm = op_set.RmsNorm(eps)
            self.query_norm_weight = source.vector(f"{name}.lq_norm.weight", f"{canonical}.q_a_layernorm.weight")
            up = Piece(f"{canonical}.q_b_proj.weight", query_rows)
            self.up = make_linear(source, op_set, f"{name}.l2q_proj", up)
        else:
            self.down = make_linear(source, op_set, f"{name}.kv2l", latent)
            direct = Piece(f"{canonical}.q_proj.weight", query_rows)
            self.up = make_linear(source, op_set, f"{name}.q_proj", direct)
        self.latent_norm = op_set.RmsNorm(eps)
        self.latent_norm_weight = source.vector(f"{name}.lkv_norm.weight", f"{canonical}.kv_a_layernorm.weight")
        kv_b, width = f"{canonical}.kv_b_proj.weight", self.nope + self.value
        key_rows = head_rows(self.heads, width, np.arange(self.nope))
        value_rows = head_rows(self.heads, width, np.arange(self.nope, width))
        self.key_up = source.matrix(f"{name}.lkv2kv_k_nope.weight", Piece(kv_b, key_rows))
        self.value_up = source.matrix(f"{name}.lkv2kv_v.weight", Piece(kv_b, value_rows))
        self.out = make_linear(source, op_set, f"{name}.wo", Piece(f"{canonical}.o_proj.weight"))

    def construct(self, x_TD: Tensor, turn: tuple, slots_T: Tensor, view: tuple, prefill: bool) -> Tensor:
        """``turn`` and ``view`` as in `model.Trunk`."""
        q_THQ, entries_TX = self.project(x_TD, turn)
        self.write_cache(self.cache, entries_TX, slots_T)
        y_TV = self.prefill(q_THQ, view) if prefill else self.decode(q_THQ, view)
        return self.total(self.out(y_TV))

    def project(self, x_TD: Tensor, turn: tuple) -> tuple[Tensor, Tensor]:
        """Queries [T, H, Q] and cache entries [T, X], both rotated."""
        down_TX = self.down(x_TD)
        if self.query_latent:
            query_TA = self.query_norm(down_TX[:, : self.query_latent], self.query_norm_weight)
            q_THQ = self.up(query_TA).reshape(-1, self.heads, self.nope + self.rope)
        else:
            q_THQ = self.up(x_TD).reshape(-1, self.heads, self.nope + self.rope)
        start = self.query_latent + self.latent
        latent_TC = self.latent_norm(down_TX[:, self.query_latent : start], self.latent_norm_weight)
        q_THQ, k_rope_TR = self.rotate(q_THQ, down_TX[:, start:], turn)
        return q_THQ, ops.concat((latent_TC, k_rope_TR), -1)

    def prefill(self, q_THQ: Tensor, view: tuple) -> Tensor:
        """Expanded: each head's keys and values from the latents of all visible tokens."""
        key_slots_S, query_ends_B, key_ends_B = view
        entries_SX = self.read_cache(self.cache, key_slots_S)
        latent_SC = entries_SX[:, : self.latent]
        k_nope_SHN = self.expand(latent_SC, self.key_up).reshape(-1, self.heads, self.nope)
        v_SHV = self.expand(latent_SC, self.value_up).reshape(-1, self.heads, self.value)
        k_rope_S1R = entries_SX[:, self.latent :].expand_dims(1)
        k_rope_SHR = ops.broadcast_to(k_rope_S1R, (-1, self.heads, -1))
        k_SHQ = ops.concat((k_nope_SHN, k_rope_SHR), -1)
        return self.attend_prefill(q_THQ, k_SHQ, v_SHV, query_ends_B, key_ends_B)

    def decode(self, q_THQ: Tensor, view: tuple) -> Tensor:
        """Absorbed: queries go into the latent space, nothing is expanded for a key."""
        tables_TM, visible_T = view
        key_up_HNC = self.key_up.reshape(self.heads, self.nope, self.latent)
        q_latent_HTC = self.absorb(q_THQ[:, :, : self.nope].transpose(1, 0, 2), key_up_HNC)
        q_THX = ops.concat((q_latent_HTC.transpose(1, 0, 2), q_THQ[:, :, self.nope :]), -1)
        mixed_THC = self.attend_decode(q_THX, self.cache, tables_TM, visible_T)
        value_up_HVC = self.value_up.reshape(self.heads, self.value, self.latent)
        y_HTV = self.release(mixed_THC.transpose(1, 0, 2), value_up_HVC)
        return y_HTV.transpose(1, 0, 2).reshape(-1, self.heads * self.value)


def _rope_order(spec: ModelSpec) -> NDArray[np.int64]:
    """Rotary rows in the order of halves."""
    return deinterleaved(spec.qk_rope_head_dim) if spec.rope_interleave else np.arange(spec.qk_rope_head_dim)


def _query_rows(spec: ModelSpec, heads: int) -> NDArray[np.int64]:
    inside = np.concatenate([np.arange(spec.qk_nope_head_dim), spec.qk_nope_head_dim + _rope_order(spec)])
    return head_rows(heads, spec.qk_head_dim, inside)


def _latent_rows(spec: ModelSpec) -> NDArray[np.int64]:
    return np.concatenate([np.arange(spec.kv_lora_rank), spec.kv_lora_rank + _rope_order(spec)])
