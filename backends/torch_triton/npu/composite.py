"""The operators of an NPU, written out: what `fused` calls has to compute this. See `operators.Operators`.

Shape letters as in `operators`; Z positions of one sequence, X width of queries and keys.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.routing import NORMALISE_EPSILON
from ....models.spec import ModelSpec
from .operators import Cache, Permuted
from .step import Decoding, Prompts

_SMALLEST = 1e-30  # a row of zeros must not give 0 / 0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x_THR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    wide_THR = x_THR.float()
    turned_THR = torch.stack([-wide_THR[..., 1::2], wide_THR[..., ::2]], dim=-1).flatten(-2)
    return (wide_THR * cos_TR[:, None] + turned_THR * sin_TR[:, None]).to(x_THR.dtype)


def write_cache(cache: Cache, latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor) -> None:
    for places, entries in ((cache.latent, latent_TC), (cache.rope, rope_TR)):
        places.flatten(0, 2).index_copy_(0, slots_T, entries)


def attend_cached(q_AHC: Tensor, q_rope_AHR: Tensor, cache: Cache, decoding: Decoding, scale: float) -> Tensor:
    q_AHX = torch.cat([q_AHC, q_rope_AHR], -1)
    block_size, heads = cache.latent.shape[1], q_AHC.shape[1]
    parts = []
    for number, (start, end) in enumerate(pairwise([0, *decoding.query_ends])):
        visible = decoding.visible[number]
        blocks = decoding.tables_BM[number, : -(-visible // block_size)].long()
        latent_ZC, rope_ZR = (part[blocks].flatten(0, 2)[:visible] for part in cache)
        k_ZHX = torch.cat([latent_ZC, rope_ZR], -1)[:, None].expand(-1, heads, -1)
        parts.append(_attend(q_AHX[start:end], k_ZHX, latent_ZC[:, None].expand(-1, heads, -1), scale))
    return torch.cat(parts)


def attend(
    q_QHN: Tensor, q_rope_QHR: Tensor, k_SHN: Tensor, k_rope_SHR: Tensor, v_SHV: Tensor, prompts: Prompts, scale: float
) -> Tensor:
    q_QHX, k_SHX = torch.cat([q_QHN, q_rope_QHR], -1), torch.cat([k_SHN, k_rope_SHR], -1)
    queries, keys = pairwise([0, *prompts.query_ends]), pairwise([0, *prompts.key_ends])
    return torch.cat(
        [
            _attend(q_QHX[slice(*own)], k_SHX[slice(*seen)], v_SHV[slice(*seen)], scale)
            for own, seen in zip(queries, keys, strict=True)
        ]
    )


def _attend(q_QHX: Tensor, k_ZHX: Tensor, v_ZHV: Tensor, scale: float) -> Tensor:
    """One sequence's new tokens, the last of which sees all Z positions. Weights are FP32, and V's dtype for V."""
    score_HQZ = torch.einsum("qhx,zhx->hqz", q_QHX.float(), k_ZHX.float()) * scale
    later_QZ = torch.ones_like(score_HQZ[0], dtype=torch.bool).triu(len(k_ZHX) - len(q_QHX) + 1)
    weight_HQZ = score_HQZ.masked_fill(later_QZ, float("-inf")).softmax(-1)
    return torch.einsum("hqz,zhv->qhv", weight_HQZ, v_ZHV.float()).to(v_ZHV.dtype)


def choose_experts(logits_TE: Tensor, bias_E: Tensor | None, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    scores_TE = logits_TE.sigmoid() if spec.scoring_func == "sigmoid" else logits_TE.softmax(dim=1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.n_group > 1 and spec.topk_method != "greedy":
        choice_TE = _limit_groups(choice_TE, spec)
    index_TK = choice_TE.topk(spec.num_experts_per_tok, dim=1).indices
    chosen_TK = scores_TE.gather(1, index_TK)
    scale = spec.routed_scaling_factor
    if spec.norm_topk_prob and (spec.num_experts_per_tok > 1 or spec.scales_normalised_weights):
        chosen_TK = chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + float(NORMALISE_EPSILON))
        scale = scale if spec.scales_normalised_weights else 1.0
    return chosen_TK * scale, index_TK.int()


def _limit_groups(choice_TE: Tensor, spec: ModelSpec) -> Tensor:
    """Mask all but the best topk_group groups."""
    choice_TGX = choice_TE.unflatten(1, (spec.n_group, -1))
    by_two = spec.topk_method == "noaux_tc"
    group_TG = choice_TGX.topk(2, dim=2).values.sum(dim=2) if by_two else choice_TGX.amax(dim=2)
    kept = group_TG.topk(spec.topk_group, dim=1).indices
    dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept, False)
    return choice_TGX.masked_fill(dropped_TG[:, :, None], float("-inf") if by_two else 0.0).flatten(1)


def permute(x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
    order_P = ids_TK.flatten().argsort(stable=True)
    places = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    counts_E = (ids_TK.flatten()[:, None] == torch.arange(experts, device=order_P.device)).sum(0)
    return Permuted(x_TD[order_P // ids_TK.shape[1]], places.int(), counts_E)


def permute_quantised(x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
    rows_PD, places, counts_E, _ = permute(x_TD, ids_TK, experts)
    codes_PD, scale_P = dynamic_quant(rows_PD)
    return Permuted(codes_PD, places, counts_E, scale_P)


def grouped_matmul(rows_PI: Tensor, weight_EIF: Tensor, counts_E: Tensor) -> Tensor:
    y_PF = rows_PI.new_empty(len(rows_PI), weight_EIF.shape[2])
    for expert, (start, end) in enumerate(pairwise([0, *counts_E.cumsum(0).tolist()])):
        y_PF[start:end] = rows_PI[start:end] @ weight_EIF[expert]
    return y_PF


def quant_grouped_matmul(
    codes_PI: Tensor, scale_P: Tensor, weight_EIF: Tensor, scale_EF: Tensor, counts_E: Tensor
) -> Tensor:
    y_PF = scale_EF.new_empty(len(codes_PI), weight_EIF.shape[2])
    for expert, (start, end) in enumerate(pairwise([0, *counts_E.cumsum(0).tolist()])):
        part = codes_PI[start:end], scale_P[start:end], weight_EIF[expert], scale_EF[expert]
        y_PF[start:end] = quant_matmul(*part, scale_EF.dtype)
    return y_PF


def unpermute(rows_PD: Tensor, places: Tensor, weight_TK: Tensor) -> Tensor:
    rows_TKD = rows_PD.float()[places.long()].unflatten(0, weight_TK.shape)
    return (rows_TKD * weight_TK[..., None]).sum(1)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def dynamic_quant(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    wide_TI = x_TI.float()
    scale_T = wide_TI.abs().amax(-1).clamp(min=_SMALLEST) / 127
    return (wide_TI / scale_T[:, None]).round().to(torch.int8), scale_T


def quant_matmul(codes_TI: Tensor, scale_T: Tensor, weight_IF: Tensor, scale_F: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in FP32, which are exact up to 2^24 and rounded by less than any scale beyond."""
    return ((codes_TI.float() @ weight_IF.float()) * scale_T[:, None] * scale_F.float()).to(dtype)
