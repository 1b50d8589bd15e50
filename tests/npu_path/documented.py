"""What the documentation in torch-npu's wheel (2.13.0, torch_npu/_op_plugin_docs.py) asks of the operators' arguments.

A rule asserts it for the arguments of one call, and makes outputs of the documented shapes and types. The wheel's own
shape functions check less: most of them accept matrices that do not fit.

Shape letters as in `operators`; B sequences, Z slots of a block.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
LAST = 65535  # the most elements of a matrix's last dimension
BFLOAT16 = 15  # as what PyTorch hands over a dtype where a schema has int
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


class Documented(TorchDispatchMode):
    """Operators of torch-npu are checked by their rules and counted; a rule's outputs stand for theirs.

    With ``has_shapes`` the operators have shape functions of their own, which run as well and must agree. ``values``
    are functions that compute the outputs, by operator; they must agree, too.
    """

    def __init__(self, has_shapes=False, values=None):
        super().__init__()
        self.has_shapes, self.values = has_shapes, values
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "npu":
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("npu::")
        self.calls.append(name)
        given = {
            argument.name: args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            for place, argument in enumerate(function._schema.arguments)
        }
        outputs = RULES[name](SimpleNamespace(**given))
        if self.has_shapes:
            own = function(*args, **kwargs)
            assert like(own) == like(outputs), f"{name}: {like(own)}, documented {like(outputs)}"
        if self.values is not None:
            computed = self.values[name](SimpleNamespace(**given))
            assert like(computed) == like(outputs), f"{name}: {like(computed)}, documented {like(outputs)}"
            return computed
        return outputs


def like(outputs):
    """Shapes and dtypes; of what is not computed, which is empty, only that."""
    parts = [outputs] if isinstance(outputs, torch.Tensor) else outputs or ()
    return [(tuple(part.shape), part.dtype) for part in parts]


def made(like, *shape, dtype=None):
    return like.new_empty(shape, dtype=dtype or like.dtype)


def rms_norm(c):
    assert c.input.dtype in FLOATS and c.gamma.dtype == c.input.dtype and c.gamma.shape == c.input.shape[-1:]
    return torch.empty_like(c.input), made(c.input, *c.input.shape[:-1], 1, dtype=torch.float32)


def add_rms_norm(c):
    assert c.x1.shape == c.x2.shape and c.x1.dtype == c.x2.dtype
    normed, deviation = rms_norm(SimpleNamespace(input=c.x1, gamma=c.gamma))
    return normed, deviation, torch.empty_like(c.x1)


def rotary_mul(c):
    """Interleaved, of [B, S, heads, R]."""
    batch, positions, heads, width = c.input.shape
    assert c.rotary_mode == "interleave" and c.rotate is None
    assert batch * heads < 1000 and width < 896 and width % 2 == 0
    for table in (c.r1, c.r2):
        assert table.shape == (1, positions, 1, width) and table.dtype == c.input.dtype in FLOATS
    return torch.empty_like(c.input)


def scatter_pa_kv_cache(c):
    """Its second case: entries [T, heads, width] into blocks of slots."""
    assert c.cache_mode in (None, "Norm") and c.compress_lens is c.compress_seq_offsets is c.seq_lens is None
    for entries, places in ((c.key, c.key_cache), (c.value, c.value_cache)):
        assert entries.is_contiguous() and places.is_contiguous() and entries.dtype == places.dtype == c.key.dtype
        assert places.dim() == 4 and entries.shape[1:] == places.shape[2:] and len(entries) == len(c.key)
    assert c.key_cache.shape[:3] == c.value_cache.shape[:3]
    assert c.slot_mapping.shape == (len(c.key),) and c.slot_mapping.dtype in (torch.int32, torch.int64)


def fused_infer_attention_score_v2(c):
    """Queries of sequences one after the other (TND): of 512, absorbed and paged, or of 128, expanded."""
    tokens, heads, width = c.query.shape
    assert c.input_layout == "TND" and c.num_query_heads == heads
    for tensor in (c.query, c.key, c.value, c.query_rope, c.key_rope):
        assert tensor.is_contiguous() and tensor.dtype == torch.bfloat16
    assert c.query_rope.shape == (tokens, heads, 64) and c.key_rope.shape == (*c.key.shape[:-1], 64)
    assert c.key.shape[:-1] == c.value.shape[:-1] and c.key.shape[-1] == width
    lengths = [end - start for start, end in pairwise([0, *c.actual_seq_qlen])]
    assert sum(lengths) == tokens <= 1_000_000 and min(lengths) > 0
    (paged if width == 512 else expanded)(c, lengths)
    if c.sparse_mode == 0:
        assert c.atten_mask is None
    else:
        assert c.sparse_mode == 3 and c.atten_mask.shape == (2048, 2048)
        assert c.atten_mask.dtype in (torch.bool, torch.int8, torch.uint8)
    return made(c.query, tokens, heads, c.value.shape[-1]), made(c.query, 0, dtype=torch.float32)


def paged(c, lengths):
    assert c.num_query_heads in HEADS and c.num_key_value_heads == 1 and max(lengths) <= 16
    assert (c.sparse_mode == 0) == (max(lengths) == 1)
    assert c.key.dim() == 3 and c.key.shape[1] == c.block_size and c.block_size in (16, 128)
    assert len(c.actual_seq_kvlen) == len(lengths)
    assert all(seen >= new for seen, new in zip(c.actual_seq_kvlen, lengths, strict=True))
    assert c.block_table.dtype == torch.int32 and c.block_table.dim() == 2 and len(c.block_table) == len(lengths)
    assert c.block_table.shape[1] >= -(-max(c.actual_seq_kvlen) // c.block_size)


def expanded(c, lengths):
    assert c.query.shape[2] == 128 == c.value.shape[2] and c.num_key_value_heads == c.num_query_heads == c.key.shape[1]
    seen = [end - start for start, end in pairwise([0, *c.actual_seq_kvlen])]
    assert c.actual_seq_kvlen[-1] == len(c.key) and len(seen) == len(lengths) <= 4096
    assert all(keys >= new for keys, new in zip(seen, lengths, strict=True))
    assert c.block_table is None and c.block_size == 0 and c.sparse_mode == 3


def moe_gating_top_k(c):
    tokens, experts = c.x.shape
    group = experts // c.group_count
    assert c.x.dtype in FLOATS and experts <= 2048 and c.input_ids is c.tid2eid is None
    assert c.bias.shape == (experts,) and c.bias.dtype == c.x.dtype
    assert experts % c.group_count == 0 and group > 2 and -(-group // 32) * 32 * c.group_count <= 2048
    assert 1 <= c.k_group <= c.group_count and 1 <= c.k <= group * c.k_group
    assert c.group_select_mode in (0, 1) and c.renorm == 0 and c.norm_type == 1
    chosen = made(c.x, tokens, c.k), made(c.x, tokens, c.k, dtype=torch.int32)
    return *chosen, made(c.x, tokens, experts, dtype=torch.float32)


def moe_init_routing_v2(c):
    tokens, width = c.x.shape
    rows = c.expert_idx.numel()
    assert c.x.dtype in FLOATS and c.expert_idx.dtype == torch.int32 and len(c.expert_idx) == tokens
    assert c.active_num in (-1, 0, rows) and 0 < c.expert_num <= 10240 and c.active_expert_range == [0, c.expert_num]
    assert (c.drop_pad_mode, c.expert_tokens_num_type, c.expert_tokens_num_flag, c.row_idx_type) == (0, 1, True, 0)
    assert c.quant_mode in (-1, 1) and c.scale is c.offset is None
    return (
        made(c.x, rows, width, dtype=torch.int8 if c.quant_mode == 1 else None),
        made(c.x, rows, dtype=torch.int32),
        made(c.x, c.expert_num, dtype=torch.int64),
        made(c.x, rows, dtype=torch.float32),
    )


def grouped_matmul(c):
    """One tensor of rows, one of matrices, in groups of rows."""
    (rows,), (weight,) = c.x, c.weight
    groups, inputs, outputs = weight.shape
    assert (c.group_type, c.group_list_type, c.act_type) == (0, 1, 0) and c.split_item in (2, 3)
    assert rows.dim() == 2 and rows.shape[1] == inputs <= LAST and outputs <= LAST and rows.dtype == weight.dtype
    assert c.group_list.shape == (groups,) and c.group_list.dtype == torch.int64 and 1 < groups <= 1024
    if rows.dtype == torch.int8:
        (scale,), (token_scale,) = c.scale, c.per_token_scale
        assert scale.shape == (groups, outputs) and scale.dtype == torch.bfloat16 and c.output_dtype == BFLOAT16
        assert token_scale.shape == (len(rows),) and token_scale.dtype == torch.float32
    else:
        assert rows.dtype in HALVES and c.scale is c.per_token_scale is c.output_dtype is None
    return [made(rows, len(rows), outputs, dtype=torch.bfloat16 if rows.dtype == torch.int8 else rows.dtype)]


def moe_token_unpermute(c):
    tokens, kept = c.probs.shape
    assert c.permuted_tokens.dtype in FLOATS and c.probs.dtype in FLOATS and kept <= 512
    assert c.sorted_indices.shape == (tokens * kept,) and c.sorted_indices.dtype == torch.int32
    assert c.permuted_tokens.dim() == 2 and len(c.permuted_tokens) == tokens * kept
    assert not c.padded_mode and c.restore_shape is None
    return made(c.permuted_tokens, tokens, c.permuted_tokens.shape[1])


def swiglu(c):
    assert c.input.dtype in FLOATS and c.dim == -1 and c.input.shape[-1] % 2 == 0
    return made(c.input, *c.input.shape[:-1], c.input.shape[-1] // 2)


def dynamic_quant(c):
    assert c.input.dtype in HALVES and c.input.dim() > 1
    return torch.empty_like(c.input, dtype=torch.int8), made(c.input, *c.input.shape[:-1], dtype=torch.float32)


def quant_matmul(c):
    (tokens, inputs), (rows, outputs) = c.x1.shape, c.x2.shape
    assert c.x1.dtype == c.x2.dtype == torch.int8 and inputs == rows <= LAST and outputs <= LAST
    assert c.scale.shape == (outputs,) and c.scale.dtype in (torch.float32, torch.bfloat16)
    assert c.pertoken_scale.shape == (tokens,) and c.pertoken_scale.dtype == torch.float32
    assert c.output_dtype == BFLOAT16 and c.offset is c.bias is None
    return made(c.x1, tokens, outputs, dtype=torch.bfloat16)


RULES = {
    f"npu_{rule.__name__}": rule
    for rule in (
        rms_norm, add_rms_norm, rotary_mul, scatter_pa_kv_cache, fused_infer_attention_score_v2, moe_gating_top_k,
        moe_init_routing_v2, grouped_matmul, moe_token_unpermute, swiglu, dynamic_quant, quant_matmul,
    )
}  # fmt: skip
