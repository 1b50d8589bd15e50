"""torch-npu's fused operators. Each computes what its namesake in `composite` writes out; see `operators.Operators`.

Called through PyTorch's dispatcher, where torch-npu registers them, so that nothing here imports it. Signatures and
limits are those of torch-npu 2.13, read from its wheel (docs/ascend.md). Shape letters as in `operators`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ....models.routing import NORMALISE_EPSILON
from ....models.spec import ModelSpec
from . import composite
from .operators import Cache, Permuted
from .step import Decoding, Prompts

_CAUSAL_MASK = 2048  # side of the triangle that attention's compressed masks want
_RIGHT_DOWN_CAUSAL, _NO_MASK = 3, 0  # the last query sees all keys


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, total


def rotate(x_THR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    tables = cos_TR[None, :, None], sin_TR[None, :, None]
    return torch.ops.npu.npu_rotary_mul(x_THR.float()[None], *tables, "interleave")[0].to(x_THR.dtype)


def write_cache(cache: Cache, latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor) -> None:
    entries = latent_TC[:, None].contiguous(), rope_TR[:, None].contiguous()
    torch.ops.npu.npu_scatter_pa_kv_cache(*entries, *cache, slots_T, cache_mode="Norm")


def attend_cached(q_AHC: Tensor, q_rope_AHR: Tensor, cache: Cache, decoding: Decoding, scale: float) -> Tensor:
    latent, rope = (part.squeeze(2) for part in cache)
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q_AHC.contiguous(),
        latent,
        latent,
        query_rope=q_rope_AHR.contiguous(),
        key_rope=rope,
        atten_mask=None if decoding.is_single else _causal_mask(q_AHC.device),
        actual_seq_qlen=decoding.query_ends,
        actual_seq_kvlen=decoding.visible,  # of pages, lengths; without them, ends
        block_table=decoding.tables_BM,
        num_query_heads=q_AHC.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=_NO_MASK if decoding.is_single else _RIGHT_DOWN_CAUSAL,
        block_size=latent.shape[1],
    )[0]


def attend(
    q_QHN: Tensor, q_rope_QHR: Tensor, k_SHN: Tensor, k_rope_SHR: Tensor, v_SHV: Tensor, prompts: Prompts, scale: float
) -> Tensor:
    heads = q_QHN.shape[1]
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q_QHN.contiguous(),
        k_SHN.contiguous(),
        v_SHV.contiguous(),
        query_rope=q_rope_QHR.contiguous(),
        key_rope=k_rope_SHR.contiguous(),
        atten_mask=_causal_mask(q_QHN.device),
        actual_seq_qlen=prompts.query_ends,
        actual_seq_kvlen=prompts.key_ends,
        num_query_heads=heads,
        num_key_value_heads=heads,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=_RIGHT_DOWN_CAUSAL,
    )[0]


@cache
def _causal_mask(device: torch.device) -> Tensor:
    return torch.ones(_CAUSAL_MASK, _CAUSAL_MASK, dtype=torch.int8, device=device).triu(1)


def choose_experts(logits_TE: Tensor, bias_E: Tensor | None, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """The fused operator is for V3's rule, with any number of groups; the family's others stay plain operators."""
    normalises = spec.norm_topk_prob and spec.scales_normalised_weights
    if bias_E is None or spec.scoring_func != "sigmoid" or spec.topk_method != "noaux_tc" or not normalises:
        return composite.choose_experts(logits_TE, bias_E, spec)
    best_two, normalise_after, sigmoid = int(spec.n_group > 1), 0, 1
    weight_TK, ids_TK, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE,
        spec.num_experts_per_tok,
        bias=bias_E,
        k_group=spec.topk_group,
        group_count=spec.n_group,
        group_select_mode=best_two,
        renorm=normalise_after,
        norm_type=sigmoid,
        routed_scaling_factor=spec.routed_scaling_factor,
        eps=float(NORMALISE_EPSILON),
    )
    return weight_TK, ids_TK


_PLAIN, _DYNAMIC_INT8 = -1, 1  # modes of quantisation


def permute(x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
    rows_PD, places, counts_E, _ = _init_routing(x_TD, ids_TK, experts, _PLAIN)
    return Permuted(rows_PD, places, counts_E)


def permute_quantised(x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
    return Permuted(*_init_routing(x_TD, ids_TK, experts, _DYNAMIC_INT8))


def _init_routing(x_TD: Tensor, ids_TK: Tensor, experts: int, mode: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts, from_tokens = 1, 0
    return torch.ops.npu.npu_moe_init_routing_v2(
        x_TD,
        ids_TK,
        active_num=ids_TK.numel(),
        expert_num=experts,
        drop_pad_mode=0,
        expert_tokens_num_type=counts,
        expert_tokens_num_flag=True,
        quant_mode=mode,
        active_expert_range=[0, experts],
        row_idx_type=from_tokens,
    )


_ONE_TENSOR, _BY_ROWS, _COUNTS = 3, 0, 1  # split_item, group_type, group_list_type


def grouped_matmul(rows_PI: Tensor, weight_EIF: Tensor, counts_E: Tensor) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul(
        [rows_PI],
        [weight_EIF],
        group_list=counts_E,
        split_item=_ONE_TENSOR,
        group_type=_BY_ROWS,
        group_list_type=_COUNTS,
    )[0]


def quant_grouped_matmul(
    codes_PI: Tensor, scale_P: Tensor, weight_EIF: Tensor, scale_EF: Tensor, counts_E: Tensor
) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul(
        [codes_PI],
        [weight_EIF],
        scale=[scale_EF],
        per_token_scale=[scale_P],
        group_list=counts_E,
        split_item=_ONE_TENSOR,
        group_type=_BY_ROWS,
        group_list_type=_COUNTS,
        output_dtype=scale_EF.dtype,
    )[0]


def unpermute(rows_PD: Tensor, places: Tensor, weight_TK: Tensor) -> Tensor:
    return torch.ops.npu.npu_moe_token_unpermute(rows_PD.float(), places, weight_TK)


def swiglu(x: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(x, -1)


def dynamic_quant(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(x_TI)


def quant_matmul(codes_TI: Tensor, scale_T: Tensor, weight_IF: Tensor, scale_F: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.npu.npu_quant_matmul(codes_TI, weight_IF, scale_F, pertoken_scale=scale_T, output_dtype=dtype)
