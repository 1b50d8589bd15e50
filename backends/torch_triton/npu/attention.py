"""Multi-head latent attention with an NPU's operators; see `attention` for the two forms.

Shape letters as in `operators`; X is N + R, W what comes out of the joint down-projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.rope import softmax_scale
from .operators import Cache, Operators
from .step import Prompts, Step
from .weights import DeviceWeights, Piece


class Attention:
    """``turn`` are the cosines and sines [T, R] of a step's positions."""

    def __init__(self, operators: Operators, source: DeviceWeights, prefix: str):
        spec = source.spec
        self._operators, self._spec = operators, spec
        self._scale = softmax_scale(spec)
        self._heads = spec.num_attention_heads // source.mesh.tp.size
        kv_a = Piece(f"{prefix}.kv_a_proj_with_mqa.weight", spec.latent_dim)
        if spec.q_lora_rank is None:
            q = Piece(f"{prefix}.q_proj.weight", spec.qk_head_dim)
            self._q_width = self._heads * spec.qk_head_dim
            self._qkv_a = source.linear(operators, q, kv_a)
        else:
            self._q_width = spec.q_lora_rank
            self._qkv_a = source.linear(operators, Piece(f"{prefix}.q_a_proj.weight"), kv_a)
            self._q_norm = source.read(f"{prefix}.q_a_layernorm.weight")
            self._q_b = source.linear(operators, Piece(f"{prefix}.q_b_proj.weight", spec.qk_head_dim))
        self._kv_norm = source.read(f"{prefix}.kv_a_layernorm.weight")
        kv_b_HYC = source.read(f"{prefix}.kv_b_proj.weight").unflatten(0, (self._heads, -1))
        self._k_b_HNC = kv_b_HYC[:, : spec.qk_nope_head_dim].contiguous()
        self._v_b_HVC = kv_b_HYC[:, spec.qk_nope_head_dim :].contiguous()
        self._o_proj = source.linear(operators, Piece(f"{prefix}.o_proj.weight"))

    def __call__(self, x_TD: Tensor, turn: tuple[Tensor, Tensor], cache: Cache, step: Step) -> Tensor:
        """[T, D], a part of the sum over the tensor-parallel ranks, and zeros for padding; writes into ``cache``."""
        y_TD = torch.zeros_like(x_TD)
        if step.tokens:
            cos_TR, sin_TR = (table_TR[: step.tokens] for table_TR in turn)
            y_TD[: step.tokens] = self._attended(x_TD[: step.tokens], cos_TR, sin_TR, cache, step)
        return y_TD

    def _attended(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache, step: Step) -> Tensor:
        spec, operators = self._spec, self._operators
        q, latent_TC, k_rope_TR = self._qkv_a(x_TD).split(
            [self._q_width, spec.kv_lora_rank, spec.qk_rope_head_dim], dim=1
        )
        if spec.q_lora_rank is not None:
            q = self._q_b(operators.rms_norm(q.contiguous(), self._q_norm, spec.latent_norm_eps))
        q_nope_THN, q_rope_THR = q.unflatten(1, (self._heads, -1)).split(
            [spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=2
        )
        latent_TC = operators.rms_norm(latent_TC.contiguous(), self._kv_norm, spec.latent_norm_eps)
        # Queries and the key turn together, the key as one more head.
        turned_TGR = operators.rotate(torch.cat([q_rope_THR, k_rope_TR[:, None]], 1), cos_TR, sin_TR)
        q_rope_THR = turned_TGR[:, : self._heads]
        operators.write_cache(cache, latent_TC, turned_TGR[:, self._heads], step.slots)
        out_THV = x_TD.new_empty(len(x_TD), self._heads, spec.v_head_dim)
        if step.decoding is not None:
            rows = step.decoding.rows
            q_AHC = _by_head(q_nope_THN[rows], self._k_b_HNC)
            context_AHC = operators.attend_cached(q_AHC, q_rope_THR[rows], cache, step.decoding, self._scale)
            out_THV[rows] = _by_head(context_AHC, self._v_b_HVC.transpose(1, 2))
        for prompts in step.prompts:
            out_THV[prompts.rows] = self._expanded(q_nope_THN, q_rope_THR, cache, prompts)
        return self._o_proj(out_THV.flatten(1))

    def _expanded(self, q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Cache, prompts: Prompts) -> Tensor:
        """[Q, H, V]: keys and values of the heads from the cached latents."""
        latent_SC, rope_SR = (part.flatten(0, 2).index_select(0, prompts.slots_S) for part in cache)
        k_SHN, v_SHV = (
            F.linear(latent_SC, weight_HXC.flatten(0, 1)).unflatten(1, (self._heads, -1))
            for weight_HXC in (self._k_b_HNC, self._v_b_HVC)
        )
        k_rope_SHR = rope_SR[:, None].expand(-1, self._heads, -1)
        rows = prompts.rows
        return self._operators.attend(
            q_nope_THN[rows], q_rope_THR[rows], k_SHN, k_rope_SHR, v_SHV, prompts, self._scale
        )


def _by_head(x_AHI: Tensor, weight_HIF: Tensor) -> Tensor:
    """[A, H, F]: each head's own product."""
    return torch.bmm(x_AHI.transpose(0, 1), weight_HIF).transpose(0, 1)
