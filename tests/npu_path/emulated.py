"""torch-npu's operators as their documentation describes them (2.13.0), for tensors of a CPU.

Written from the formulas there, and apart from the backend's own plain operators, so that a wrong idea of what an
argument means shows. Where the documentation is silent, the padding or the unused output is NaN, -1 or the largest
number. Arguments have been checked by `documented`.
"""

from itertools import pairwise

import torch

from tests.npu_path.documented import BFLOAT16

NAN = float("nan")


def rms_norm(c):
    deviation = torch.rsqrt(c.input.float().pow(2).mean(-1, keepdim=True) + c.epsilon)
    return (c.input.float() * deviation).to(c.input.dtype) * c.gamma, deviation


def add_rms_norm(c):
    total = (c.x1.float() + c.x2.float()).to(c.x1.dtype)
    c.input = total
    normed, deviation = rms_norm(c)
    return normed, deviation, total


def rotary_mul(c):
    """x1 = input[..., ::2], x2 = input[..., 1::2]; -x2 and x1 in turns, times r2, plus the input times r1."""
    turned = torch.empty_like(c.input)
    turned[..., ::2], turned[..., 1::2] = -c.input[..., 1::2], c.input[..., ::2]
    return c.input * c.r1 + turned * c.r2


def scatter_pa_kv_cache(c):
    for entries, places in ((c.key, c.key_cache), (c.value, c.value_cache)):
        block_size = places.shape[1]
        for entry, slot in zip(entries, c.slot_mapping.tolist(), strict=True):
            places[slot // block_size, slot % block_size] = entry


def fused_infer_attention_score_v2(c):
    attended = torch.full((*c.query.shape[:2], c.value.shape[-1]), NAN, dtype=c.query.dtype)
    starts, ends = zip(*pairwise([0, *c.actual_seq_qlen]), strict=True)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        key, value, key_rope = keys_of(c, number)
        query = torch.cat([c.query[start:end], c.query_rope[start:end]], -1).float()
        keys = torch.cat([key, key_rope], -1).float()
        score = torch.einsum("qhd,khd->hqk", query, keys.expand(-1, query.shape[1], -1)) * c.softmax_scale
        if c.sparse_mode == 3:  # the triangle's lower right corner is that of the scores
            later = torch.arange(len(keys))[None] > torch.arange(end - start)[:, None] + len(keys) - (end - start)
            score = score.masked_fill(later, -torch.inf)
        weight = score.softmax(-1).to(c.query.dtype).float()
        values = value.float().expand(-1, query.shape[1], -1)
        attended[start:end] = torch.einsum("hqk,khd->qhd", weight, values).to(c.query.dtype)
    return attended, c.query.new_empty(0, dtype=torch.float32)


def keys_of(c, number):
    """[keys, heads, width] of one sequence: in pages, whose lengths are lengths, or beside each other, with ends."""
    if c.block_table is None:
        start, end = list(pairwise([0, *c.actual_seq_kvlen]))[number]
        return c.key[start:end], c.value[start:end], c.key_rope[start:end]
    slots = torch.arange(c.actual_seq_kvlen[number])
    blocks = c.block_table[number][slots // c.block_size].long()
    return tuple(part[blocks, slots % c.block_size][:, None] for part in (c.key, c.value, c.key_rope))


def moe_gating_top_k(c):
    """Sigmoid; with the bias added, the groups with the best two, and in them the best experts."""
    scores = c.x.sigmoid()
    choice = scores + c.bias
    groups = choice.view(len(choice), c.group_count, -1)
    best = groups.sort(-1, descending=True).values
    rank = (best[..., 0] + best[..., 1] if c.group_select_mode == 1 else best[..., 0]).argsort(-1, descending=True)
    for row, kept in zip(groups, rank[:, : c.k_group].tolist(), strict=True):
        row[[group for group in range(c.group_count) if group not in kept]] = -torch.inf
    ids = choice.argsort(-1, descending=True)[:, : c.k]
    chosen = scores.gather(1, ids)
    weight = chosen / (chosen.sum(-1, keepdim=True) + c.eps) * c.routed_scaling_factor
    return weight, ids.int(), torch.full_like(scores, NAN)


def moe_init_routing_v2(c):
    """Rows of experts in order; where a token's choices went; rows of each expert."""
    tokens, kept = c.expert_idx.shape
    pairs = sorted((expert, place) for place, expert in enumerate(c.expert_idx.flatten().tolist()))
    rows = c.x[[place // kept for _, place in pairs]]
    places = torch.full((tokens * kept,), -1, dtype=torch.int32)
    for row, (_, place) in enumerate(pairs):
        places[place] = row
    counts = torch.tensor([sum(expert == number for expert, _ in pairs) for number in range(c.expert_num)])
    scale = torch.full((len(rows),), NAN)
    if c.quant_mode == 1:
        rows, scale = quantised(rows)
    return rows, places, counts, scale


def grouped_matmul(c):
    """y_i = x_i weight_i, of codes times both scales. Rows past the last group are not written."""
    (rows,), (weight,) = c.x, c.weight
    dtype = torch.bfloat16 if c.output_dtype == BFLOAT16 else rows.dtype
    product = torch.full((len(rows), weight.shape[2]), NAN, dtype=dtype)
    for group, (start, end) in enumerate(pairwise([0, *c.group_list.cumsum(0).tolist()])):
        part = rows[start:end].double() @ weight[group].double()
        if c.scale is not None:
            part = part * c.scale[0][group] * c.per_token_scale[0][start:end, None]
        product[start:end] = part.to(dtype)
    return [product]


def moe_token_unpermute(c):
    tokens, kept = c.probs.shape
    rows = c.permuted_tokens[c.sorted_indices.long()].view(tokens, kept, -1)
    return (rows * c.probs[..., None]).sum(1)


def swiglu(c):
    gate, up = c.input.float().chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(c.input.dtype)


def dynamic_quant(c):
    return quantised(c.input)


def quantised(rows):
    """scale = rowMax(abs(x)) / 127, y = round(x / scale)."""
    scale = rows.float().abs().amax(-1) / 127
    return (rows.float() / scale[:, None]).round().to(torch.int8), scale


def quant_matmul(c):
    product = c.x1.double() @ c.x2.double() * c.scale * c.pertoken_scale[:, None]
    return product.to(torch.bfloat16)


VALUES = {
    f"npu_{value.__name__}": value
    for value in (
        rms_norm, add_rms_norm, rotary_mul, scatter_pa_kv_cache, fused_infer_attention_score_v2, moe_gating_top_k,
        moe_init_routing_v2, grouped_matmul, moe_token_unpermute, swiglu, dynamic_quant, quant_matmul,
    )
}  # fmt: skip
