"""The operators that this backend calls have the signatures that it was written for, in the installed MindSpore.

docs/ascend.md says which versions were compared.
"""

import ast
from pathlib import Path

import pytest

mindspore = pytest.importorskip("mindspore", reason="mindspore is not installed")

CALLS = {
    "RmsNorm": ("epsilon=1e-06", "x, gamma"),
    "AddRmsNorm": ("", "x1, x2, gamma, epsilon=1e-06"),
    "RotaryPositionEmbedding": ("", "x, cos, sin, mode=0"),
    "ReshapeAndCache": ("", "key, value=None, key_cache=None, value_cache=None, slot_mapping=None"),
    "FlashAttentionScore": (
        "head_num, keep_prob=1.0, scale_value=1.0, pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0, "
        "input_layout='BSH', sparse_mode=0",
        "query, key, value, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None, prefix=None, "
        "actual_seq_qlen=None, actual_seq_kvlen=None",
    ),
    "PagedAttention": (
        "head_num, scale_value, kv_head_num, kv_cache_quant_mode='DEFAULT', mask_mode='MASK_DEFAULT', mla_v_dim=0",
        "query, key_cache, value_cache=None, block_tables=None, context_lens=None, antiquant_scale=None, "
        "antiquant_offset=None, attn_mask=None, q_seq_lens=None, alibi_mask=None",
    ),
    "FusedAddTopKDiv": (
        "",
        "x, add_num, group_num, group_topk, n, k, activate_type=0, is_norm=True, scale=2.5, mapping_num=None, "
        "mapping_table=None, enable_expert_mapping=False",
    ),
    "MoeInitRoutingV2": (
        "",
        "x, expert_idx, active_num, expert_capacity, expert_num, drop_pad_mode, expert_tokens_count_or_cumsum_flag, "
        "expert_tokens_before_capacity_flag",
    ),
    "MoeTokenUnpermute": ("", "permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None"),
    "GroupedMatmulV4": (
        "",
        "x, weight, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None, "
        "pre_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None, "
        "activation_quant_offset=None, split_item=0, group_type=-1, group_list_type=0, act_type=0, output_dtype=None",
    ),
    "MoeDistributeDispatch": (
        "",
        "x, expert_ids, ep_world_size, ep_rank_id, moe_expert_num, expert_scales=None, scales=None, "
        "x_active_mask=None, group_ep=None, group_tp=None, tp_world_size=0, tp_rank_id=0, "
        "expert_shard_type=0, shared_expert_num=0, shared_expert_rank_num=0, quant_mode=0, "
        "global_bs=0, expert_token_nums_type=0",
    ),
    "MoeDistributeCombine": (
        "",
        "expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, ep_world_size, ep_rank_id, moe_expert_num, "
        "tp_send_counts=None, x_active_mask=None, activate_scale=None, weight_scale=None, group_list=None, "
        "expand_scales=None, group_ep=None, group_tp=None, tp_world_size=0, tp_rank_id=0, expert_shard_type=0, "
        "shared_expert_num=0, shared_export_rank_num=0, global_bs=0, out_dtype=0, common_quant_mode=0, "
        "group_list_type=0",
    ),
    "Swiglu": ("", "input, dim=-1"),
    "DynamicQuantExt": ("", "x, smooth_scales=None"),
    "QuantV2": ("", "x, scale, offset, sqrt_mode=False, rounding_mode='ROUND', dst_type=mstype.int8"),
    "QuantBatchMatmul": (
        "transpose_x1=False, transpose_x2=False, dtype=mstype.float16",
        "x1, x2, scale, offset=None, bias=None, pertokenScaleOptional=None",
    ),
}


@pytest.fixture(scope="module")
def definitions():
    """Arguments of the constructor and of the call of every operator, as the installed definitions spell them."""
    file = Path(mindspore.__file__).parent / "ops" / "auto_generate" / "gen_ops_prim.py"
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in CALLS:
            methods = {part.name: ast.unparse(part.args) for part in node.body if isinstance(part, ast.FunctionDef)}
            found[node.name] = tuple(
                methods.get(name, "self").removeprefix("self").removeprefix(", ") for name in ("__init__", "__call__")
            )
    return found


@pytest.mark.parametrize("name", CALLS)
def test_signature(definitions, name):
    assert definitions[name] == CALLS[name]
