"""Multi-head latent attention on a GPU, over a paged cache of latents, BF16 or FP8; `..attention` says what the two
forms are.

Few new tokens of a sequence attend in the absorbed form, prompts in the expanded form; each in one kernel for all
sequences.

Shape letters: T tokens of the step, A tokens in absorbed form, B sequences, Q new tokens of a sequence, S visible
positions, H heads, N nope dim, R rope dim, V value dim, Y = N + V, C latent, X = C + R, P cache blocks, Z slots of one,
E width of a cache entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.rope import softmax_scale
from ....models.spec import ModelSpec
from ..kernels.absorb import absorb
from ..kernels.entries import read_entries
from ..kernels.kv_b import FEW_TOKENS, KvB
from ..kernels.mla_decode import attend, merged
from ..kernels.prompt_attention import prompt_attention
from ..kernels.quant import GROUP
from ..kernels.rope_cache import Tables, rope_cache
from ..kernels.values import values
from .inputs import Absorbed, Prompts, Step
from .linear import Linear, Norm, Operand, operand


class Projections(NamedTuple):
    """The layers of one attention block.

    ``qkv_a`` gives [q_a, or all queries | latent | rope key], of which the latent starts at ``latent_column``.
    Without q_b the queries are direct. ``kv_b``: the numbers of ``kv_b_HYC`` in their fewest bytes.
    """

    qkv_a: Linear
    latent_column: int
    q_norm: Norm | None
    q_b: Linear | None
    kv_norm_C: Tensor
    kv_b_HYC: Tensor
    kv_b: KvB
    o: Linear


class Attention:
    def __init__(self, spec: ModelSpec, layers: Projections, rope: Tables):
        self._spec = spec
        self._layers = layers
        self._rope = rope
        self._scale = softmax_scale(spec)
        self._k_b_HNC, self._v_b_HVC = layers.kv_b_HYC.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=1)

    def __call__(self, x: Operand, step: Step, cache_PZE: Tensor) -> Tensor:
        """BF16 [T, D]; writes the new tokens' entries into this layer's cache."""
        spec, layers = self._spec, self._layers
        projected = layers.qkv_a(x)
        kv_TX = projected[:, layers.latent_column : layers.latent_column + spec.latent_dim]
        q = projected
        if layers.q_b is not None and layers.q_norm is not None:
            q = layers.q_b(operand(layers.q_norm(projected[:, : spec.q_lora_rank])))
        heads, width = len(layers.kv_b_HYC), spec.qk_head_dim
        q_THX = q[:, : heads * width].unflatten(1, (heads, width))
        out: Operand
        if step.decode is not None:
            out = self._decode(q_THX, kv_TX, step, step.decode, cache_PZE)
        else:
            out = self._mixed(q_THX, kv_TX, step, cache_PZE)
        return layers.o(out)[:, : spec.hidden_size]

    def _decode(self, q_THX: Tensor, kv_TX: Tensor, step: Step, decode: Absorbed, cache_PZE: Tensor) -> Operand:
        """All tokens attend in the absorbed form."""
        if len(q_THX) <= FEW_TOKENS:
            return self._decode_few(q_THX, kv_TX, step, decode, cache_PZE)
        spec = self._spec
        q_absorbed_THX = self._absorb(q_THX)
        rotated_THR = q_absorbed_THX[:, :, spec.kv_lora_rank :]
        self._rotate(q_THX[:, :, spec.qk_nope_head_dim :], rotated_THR, kv_TX, step, cache_PZE)
        return self._values(merged(attend(q_absorbed_THX, *self._absorbed(decode, cache_PZE))))

    def _decode_few(self, q_THX: Tensor, kv_TX: Tensor, step: Step, decode: Absorbed, cache_PZE: Tensor) -> Operand:
        layers, spec, form = self._layers, self._spec, self._layers.o.form
        q_absorbed_THX = absorb(
            q_THX, layers.kv_b, kv_TX, layers.kv_norm_C, spec.latent_norm_eps, step.positions_T, step.slots_T,
            self._rope, cache_PZE,
        )  # fmt: skip
        attended = attend(q_absorbed_THX, *self._absorbed(decode, cache_PZE))
        quantise = form.codes == "fp8" and spec.v_head_dim == GROUP
        return values(attended, layers.kv_b, spec.v_head_dim, quantise, form.ue8m0)

    def _mixed(self, q_THX: Tensor, kv_TX: Tensor, step: Step, cache_PZE: Tensor) -> Tensor:
        """Queries are rotated where they are."""
        nope, latent = self._spec.qk_nope_head_dim, self._spec.kv_lora_rank
        self._rotate(q_THX[:, :, nope:], q_THX[:, :, nope:], kv_TX, step, cache_PZE)
        out_THV = q_THX.new_empty(*q_THX.shape[:2], self._spec.v_head_dim)
        out_THV[step.tokens or 0 :] = 0  # padding, or what may be padding, stays finite
        for absorbed in step.absorbed:
            q_AHX = q_THX[absorbed.rows]
            q_absorbed_AHX = self._absorb(q_AHX)
            q_absorbed_AHX[:, :, latent:] = q_AHX[:, :, nope:]
            out_AY = self._values(merged(attend(q_absorbed_AHX, *self._absorbed(absorbed, cache_PZE))))
            out_THV[absorbed.rows] = out_AY.unflatten(1, out_THV.shape[1:])
        for prompts in step.prompts:
            self._attend_expanded(q_THX, prompts, cache_PZE, out_THV)
        return out_THV.flatten(1)

    def _rotate(self, rope_THR: Tensor, rotated_THR: Tensor, kv_TX: Tensor, step: Step, cache_PZE: Tensor) -> None:
        """Queries, into ``rotated_THR``, and keys, which go into the cache with their latents."""
        weight, eps = self._layers.kv_norm_C, self._spec.latent_norm_eps
        rope_cache(
            kv_TX, weight, eps, rope_THR, rotated_THR, step.positions_T, step.slots_T, self._rope, cache_PZE
        )  # fmt: skip

    def _absorb(self, q_AHX: Tensor) -> Tensor:
        """Queries [A, H, X] of the latents; their rope part is still to be written."""
        spec = self._spec
        q_absorbed_AHX = q_AHX.new_empty(*q_AHX.shape[:2], spec.latent_dim)
        latent_HAC = q_absorbed_AHX[:, :, : spec.kv_lora_rank].transpose(0, 1)
        torch.bmm(q_AHX[:, :, : spec.qk_nope_head_dim].transpose(0, 1), self._k_b_HNC, out=latent_HAC)
        return q_absorbed_AHX

    def _values(self, context_AHC: Tensor) -> Tensor:
        """[A, H V], of attended latents."""
        out_AHV = context_AHC.new_empty(*context_AHC.shape[:2], self._spec.v_head_dim)
        torch.bmm(context_AHC.transpose(0, 1), self._v_b_HVC.transpose(1, 2), out=out_AHV.transpose(0, 1))
        return out_AHV.flatten(1)

    def _absorbed(self, absorbed: Absorbed, cache_PZE: Tensor) -> tuple[Tensor, Tensor, Tensor, float, int, int]:
        """What attention in this form takes besides queries. Tables and lengths came before the step's first kernel."""
        latent = self._spec.kv_lora_rank
        return cache_PZE, absorbed.table_BM, absorbed.lengths_B, self._scale, latent, absorbed.longest

    def _attend_expanded(self, q_THX: Tensor, prompts: Prompts, cache_PZE: Tensor, out_THV: Tensor) -> None:
        """Keys and values of the heads from the cached latents, then attention over them into ``out_THV``."""
        widths = self._spec.kv_lora_rank, self._spec.qk_rope_head_dim
        latent_SC, rope_SR = read_entries(cache_PZE, prompts.slots_S, *widths).split(widths, dim=1)
        kv_SHY = F.linear(latent_SC, self._layers.kv_b_HYC.flatten(0, 1)).unflatten(1, (q_THX.shape[1], -1))
        prompt_attention(q_THX, kv_SHY, rope_SR, prompts.tiles_U, out_THV, self._scale)
