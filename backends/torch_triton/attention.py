"""Multi-head latent attention over a paged cache of latents.

The cache holds, per layer and token, the normed latent and the rotated rope key; never keys and values of the heads.
*Absorbed* attention moves kv_b_proj to the query and to the output and runs on the cached entries themselves; it costs
least for few new tokens. *Expanded* attention computes the heads' keys and values; it costs least for many. Source:
DeepSeek-V2 (arXiv 2405.04434) section 2.1; `models.reference` has both forms in numpy.

Shape letters: T tokens of the step, A tokens in absorbed form, G those of one group, Q new tokens of one sequence,
S cached positions, H heads of this rank, N nope dim, R rope dim, V value dim, C latent, X values of a cache entry
(C + R), E what the cache holds of them, P pairs (R / 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.rope import softmax_scale
from ...models.spec import ModelSpec
from .cache import from_entries, to_entries
from .layers import Linear, RMSNorm, adjacent_pairs, rotate
from .plan import Plan, Prompt
from .weights import TensorSource


class Attention:
    def __init__(self, spec: ModelSpec, source: TensorSource, prefix: str):
        self._spec = spec
        self._scale = softmax_scale(spec)
        self._heads = spec.num_attention_heads // source.mesh.tp.size
        self._load_queries(spec, source, prefix)
        kv_b = source.read(f"{prefix}.kv_b_proj.weight")
        self.kv_b = Linear(kv_b)
        kv_b_HYC = kv_b.view(self._heads, -1, spec.kv_lora_rank)
        self.k_b_HNC = kv_b_HYC[:, : spec.qk_nope_head_dim].contiguous()
        self.v_b_HCV = kv_b_HYC[:, spec.qk_nope_head_dim :].transpose(1, 2).contiguous()
        self.kv_a_norm = RMSNorm(source.read(f"{prefix}.kv_a_layernorm.weight"), spec.latent_norm_eps)
        self.o_proj = Linear(source.read(f"{prefix}.o_proj.weight"))

    def _load_queries(self, spec: ModelSpec, source: TensorSource, prefix: str) -> None:
        """Projections of x are one matrix: [q_a or q | latent | rope key]."""
        kv_a = adjacent_pairs(spec, source.read(f"{prefix}.kv_a_proj_with_mqa.weight"), spec.latent_dim)
        name = "q_proj" if spec.q_lora_rank is None else "q_b_proj"
        q = adjacent_pairs(spec, source.read(f"{prefix}.{name}.weight"), spec.qk_head_dim)
        self._q_width = spec.q_lora_rank or len(q)
        if spec.q_lora_rank is None:
            self.qkv_a = Linear(torch.cat([q, kv_a]))
        else:
            self.qkv_a = Linear(torch.cat([source.read(f"{prefix}.q_a_proj.weight"), kv_a]))
            self.q_a_norm = RMSNorm(source.read(f"{prefix}.q_a_layernorm.weight"), spec.latent_norm_eps)
            self.q_b = Linear(q)

    def __call__(self, x_TD: Tensor, turn_TP: Tensor, cache_PSE: Tensor, plan: Plan) -> Tensor:
        """[T, D], a part of the sum over the tensor-parallel ranks; writes the new tokens' entries into ``cache_PSE``,
        this layer's blocks.
        """
        spec = self._spec
        widths = [self._q_width, spec.kv_lora_rank, spec.qk_rope_head_dim]
        q, latent_TC, k_rope_TR = self.qkv_a(x_TD).split(widths, dim=1)
        entries_TX = torch.cat([self.kv_a_norm(latent_TC), rotate(k_rope_TR, turn_TP)], dim=1)
        held_TE = to_entries(entries_TX, spec.kv_lora_rank, cache_PSE.dtype)
        cache_PSE.flatten(0, 1).index_copy_(0, plan.slots_T, held_TE)
        if spec.q_lora_rank is not None:
            q = self.q_b(self.q_a_norm(q))
        q_THX = q.view(len(q), self._heads, spec.qk_head_dim)
        q_nope_THN, q_rope_THR = q_THX.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=2)
        q_rope_THR = rotate(q_rope_THR, turn_TP[:, None])
        out_THV = x_TD.new_empty(len(x_TD), self._heads, spec.v_head_dim)
        if plan.groups:
            rows = plan.absorbed_rows
            out_THV[rows] = self._absorbed(q_nope_THN[rows], q_rope_THR[rows], cache_PSE, plan)
        for prompt in plan.prompts:
            rows = prompt.rows
            q_QHX = torch.cat([q_nope_THN[rows], q_rope_THR[rows]], dim=2)
            out_THV[rows] = self._expanded(q_QHX, cache_PSE, prompt)
        return self.o_proj(out_THV.flatten(1))

    def _absorbed(self, q_nope_AHN: Tensor, q_rope_AHR: Tensor, cache_PSE: Tensor, plan: Plan) -> Tensor:
        """[A, H, V]: multi-query attention in which an entry is key and value at once."""
        q_AHX = torch.cat([_by_head(q_nope_AHN, self.k_b_HNC), q_rope_AHR], dim=2)
        context_AHX = torch.empty_like(q_AHX)
        for group in plan.groups:
            held_GSE = cache_PSE[group.blocks_GM].flatten(1, 2)
            entries_GSX = from_entries(held_GSE, self._spec.kv_lora_rank, q_AHX.dtype)
            # Values as wide as the keys let PyTorch use its flash kernel; the rope part of the result is not used.
            attended_GHX = F.scaled_dot_product_attention(
                q_AHX[group.rows][:, None],
                entries_GSX[:, None],
                entries_GSX[:, None],
                attn_mask=group.mask_GS[:, None, None],
                scale=self._scale,
            )[:, 0]
            context_AHX[group.rows] = attended_GHX
        return _by_head(context_AHX[:, :, : self._spec.kv_lora_rank], self.v_b_HCV)

    def _expanded(self, q_QHX: Tensor, cache_PSE: Tensor, prompt: Prompt) -> Tensor:
        """[Q, H, V]: keys and values of the heads from the cached latents, for one sequence."""
        spec = self._spec
        held_SE = cache_PSE[prompt.blocks_M].flatten(0, 1)[: prompt.visible]
        entries_SX = from_entries(held_SE, spec.kv_lora_rank, q_QHX.dtype)
        latent_SC, k_rope_SR = entries_SX.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=1)
        kv_SHY = self.kv_b(latent_SC).view(len(entries_SX), self._heads, -1)
        k_nope_SHN, v_SHV = kv_SHY.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=2)
        k_SHX = torch.cat([k_nope_SHN, k_rope_SR[:, None].expand(-1, self._heads, -1)], dim=2)
        width = max(spec.qk_head_dim, spec.v_head_dim)  # PyTorch's flash kernel wants one width for all three
        q, k, v = (F.pad(part, (0, width - part.shape[2])).transpose(0, 1)[None] for part in (q_QHX, k_SHX, v_SHV))
        attended_HQX = F.scaled_dot_product_attention(
            q, k, v, attn_mask=prompt.mask_QS, is_causal=prompt.mask_QS is None, scale=self._scale
        )[0]
        return attended_HQX.transpose(0, 1)[:, :, : spec.v_head_dim]


_MIN_ROWS = 4


def _by_head(x_AHK: Tensor, weight_HKN: Tensor) -> Tensor:
    """Each head's own product, [A, H, N]; padded to four tokens, below which MKL takes a path that rounds otherwise."""
    tokens = len(x_AHK)
    if tokens < _MIN_ROWS:
        x_AHK = F.pad(x_AHK, (0, 0, 0, 0, 0, _MIN_ROWS - tokens))
    return torch.bmm(x_AHK.transpose(0, 1), weight_HKN).transpose(0, 1)[:tokens]
