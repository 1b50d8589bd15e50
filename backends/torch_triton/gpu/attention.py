"""Multi-head latent attention on a GPU, over a paged BF16 cache of latents; `..attention` says what the two forms are.

Few new tokens of a sequence attend in the absorbed form, in one kernel for all sequences; prompts in the expanded form,
one sequence at a time.

Shape letters: T tokens of the step, A tokens in absorbed form, B sequences, Q new tokens of a sequence, S visible
positions, H heads, N nope dim, R rope dim, V value dim, Y = N + V, C latent, X = C + R, P cache blocks, Z slots of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ....models.rope import softmax_scale
from ....models.spec import ModelSpec
from ..kernels.mla_decode import mla_decode
from ..kernels.rope_cache import rope_cache
from .inputs import Absorbed, Prompt, Step
from .linear import Linear, Norm, Operand, operand


class Rope(NamedTuple):
    """float32 [positions, R / 2]."""

    cos: Tensor
    sin: Tensor


class Projections(NamedTuple):
    """The layers of one attention block.

    ``qkv_a`` gives [q_a, or all queries | latent | rope key], of which the latent starts at ``latent_column``.
    Without q_b the queries are direct.
    """

    qkv_a: Linear
    latent_column: int
    q_norm: Norm | None
    q_b: Linear | None
    kv_norm_C: Tensor
    kv_b_HYC: Tensor
    o: Linear


class Attention:
    def __init__(self, spec: ModelSpec, layers: Projections, rope: Rope):
        self._spec = spec
        self._layers = layers
        self._rope = rope
        self._scale = softmax_scale(spec)
        self._k_b_HNC, v_b_HVC = layers.kv_b_HYC.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
        self._v_b_HCV = v_b_HVC.transpose(1, 2)

    def __call__(self, x: Operand, step: Step, cache_PZX: Tensor) -> Tensor:
        """BF16 [T, D]; writes the new tokens' entries into this layer's cache."""
        spec, layers = self._spec, self._layers
        projected = layers.qkv_a(x)
        kv_TX = projected[:, layers.latent_column : layers.latent_column + spec.latent_dim]
        q = projected
        if layers.q_b is not None and layers.q_norm is not None:
            q = layers.q_b(operand(layers.q_norm(projected[:, : spec.q_lora_rank])))
        heads, width = spec.num_attention_heads, spec.qk_head_dim
        q_THX = q[:, : heads * width].unflatten(1, (heads, width))
        if step.decode is not None:
            out_THV = self._decode(q_THX, kv_TX, step, step.decode, cache_PZX)
        else:
            out_THV = self._mixed(q_THX, kv_TX, step, cache_PZX)
        return layers.o(out_THV.flatten(1))[:, : spec.hidden_size]

    def _decode(self, q_THX: Tensor, kv_TX: Tensor, step: Step, decode: Absorbed, cache_PZX: Tensor) -> Tensor:
        """All tokens attend in the absorbed form: rotated queries go straight to where attention reads them."""
        q_absorbed_THX = self._absorb(q_THX)
        rope = q_absorbed_THX[:, :, self._spec.kv_lora_rank :]
        self._write(q_THX[:, :, self._spec.qk_nope_head_dim :], rope, kv_TX, step, cache_PZX)
        return self._attend_absorbed(q_absorbed_THX, decode, cache_PZX)

    def _mixed(self, q_THX: Tensor, kv_TX: Tensor, step: Step, cache_PZX: Tensor) -> Tensor:
        nope, latent = self._spec.qk_nope_head_dim, self._spec.kv_lora_rank
        self._write(q_THX[:, :, nope:], q_THX[:, :, nope:], kv_TX, step, cache_PZX)
        out_THV = q_THX.new_zeros(*q_THX.shape[:2], self._spec.v_head_dim)
        for absorbed in step.absorbed:
            q_AHX = q_THX[absorbed.rows]
            q_absorbed_AHX = self._absorb(q_AHX)
            q_absorbed_AHX[:, :, latent:] = q_AHX[:, :, nope:]
            out_THV[absorbed.rows] = self._attend_absorbed(q_absorbed_AHX, absorbed, cache_PZX)
        for prompt in step.prompts:
            out_THV[prompt.rows] = self._attend_expanded(q_THX[prompt.rows], prompt, cache_PZX)
        return out_THV

    def _write(self, rope_THR: Tensor, rotated_THR: Tensor, kv_TX: Tensor, step: Step, cache_PZX: Tensor) -> None:
        weight, eps = self._layers.kv_norm_C, self._spec.latent_norm_eps
        rope_cache(
            kv_TX, weight, eps, rope_THR, rotated_THR, step.positions_T, step.slots_T, *self._rope, cache_PZX
        )  # fmt: skip

    def _absorb(self, q_AHX: Tensor) -> Tensor:
        """Queries [A, H, X] of the latents; their rope part is still to be written."""
        spec = self._spec
        q_absorbed_AHX = q_AHX.new_empty(*q_AHX.shape[:2], spec.latent_dim)
        latent_HAC = q_absorbed_AHX[:, :, : spec.kv_lora_rank].transpose(0, 1)
        torch.bmm(q_AHX[:, :, : spec.qk_nope_head_dim].transpose(0, 1), self._k_b_HNC, out=latent_HAC)
        return q_absorbed_AHX

    def _attend_absorbed(self, q_AHX: Tensor, absorbed: Absorbed, cache_PZX: Tensor) -> Tensor:
        latent, table_BM, lengths_B = self._spec.kv_lora_rank, absorbed.table_BM, absorbed.lengths_B
        context_AHC = mla_decode(q_AHX, cache_PZX, table_BM, lengths_B, self._scale, latent, absorbed.longest)
        out_AHV = q_AHX.new_empty(*q_AHX.shape[:2], self._spec.v_head_dim)
        torch.bmm(context_AHC.transpose(0, 1), self._v_b_HCV, out=out_AHV.transpose(0, 1))
        return out_AHV

    def _attend_expanded(self, q_QHX: Tensor, prompt: Prompt, cache_PZX: Tensor) -> Tensor:
        """[Q, H, V]: keys and values of the heads from the cached latents, for one sequence."""
        spec = self._spec
        entries_SX = cache_PZX[prompt.blocks_M].flatten(0, 1)[: prompt.visible]
        latent_SC, k_rope_SR = entries_SX.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=1)
        kv_SHY = F.linear(latent_SC, self._layers.kv_b_HYC.flatten(0, 1)).unflatten(1, (spec.num_attention_heads, -1))
        k_nope_SHN, v_SHV = kv_SHY.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=2)
        k_SHX = torch.cat([k_nope_SHN, k_rope_SR[:, None].expand(-1, spec.num_attention_heads, -1)], dim=2)
        width = max(spec.qk_head_dim, spec.v_head_dim)  # PyTorch's flash kernel wants one width for all three
        q, k, v = (F.pad(part, (0, width - part.shape[2])).transpose(0, 1)[None] for part in (q_QHX, k_SHX, v_SHV))
        bias = causal_lower_right(len(q_QHX), prompt.visible)
        attended_HQX = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self._scale)[0]
        return attended_HQX.transpose(0, 1)[:, :, : spec.v_head_dim]
