"""The fused operators of an Ascend device. Each computes what its namesake in `composite` writes out.

Signatures are those of MindSpore's operator definitions (mindspore.ops.auto_generate, 2.10). Rotary embedding runs as
RotaryPositionEmbedding, because ApplyRotaryPosEmb takes no FP32 and its tables have the type of the queries.

Shape letters: T tokens, H heads, X cache entry (latent and rope key), C latent, R rope dim, S visible positions, D
hidden, E experts, K experts a token, N rows sorted by expert (T times K), F features, B sequences, M blocks.
"""

from __future__ import annotations

import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate as fused

from ....models.spec import ModelSpec
from .. import soc
from ..mesh import Group
from . import composite

PREFILL_TOKENS = 4096  # the FP32 rows that experts' results are summed from are K times as many
_CAUSAL_MASK = 2048  # side of the triangle that FlashAttentionScore's sparse modes want
_RIGHT_DOWN_CAUSAL = 3  # the last query sees all keys
_ALL_TOKENS = 2**31 - 1


class RmsNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.norm = fused.RmsNorm(eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight)[0]


class AddRmsNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps
        self.norm = fused.AddRmsNorm()

    def construct(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, _, total = self.norm(x, residual, weight, self.eps)
        return normed, total


class Turn(nn.Cell):
    def __init__(self, nope: int, rope: int):
        super().__init__(auto_prefix=False)
        self.rope = rope

    def construct(self, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        return cos_TR.reshape(1, -1, 1, self.rope), sin_TR.reshape(1, -1, 1, self.rope)


class Rotate(nn.Cell):
    """The rotary parts of queries and keys together, as one more head."""

    def __init__(self, heads: int, nope: int, rope: int):
        super().__init__(auto_prefix=False)
        self.heads, self.nope, self.rope = heads, nope, rope
        self.rotate = fused.RotaryPositionEmbedding()

    def construct(self, q_THQ: Tensor, k_TR: Tensor, turn: tuple) -> tuple[Tensor, Tensor]:
        cos_1T1R, sin_1T1R = turn
        both_THR = ops.concat((q_THQ[:, :, self.nope :], k_TR.expand_dims(1)), 1).astype(ms.float32)
        turned_1THR = self.rotate(both_THR.expand_dims(0), cos_1T1R, sin_1T1R, 0)
        turned_THR = turned_1THR.reshape(-1, self.heads + 1, self.rope).astype(q_THQ.dtype)
        q_THQ = ops.concat((q_THQ[:, :, : self.nope], turned_THR[:, : self.heads]), -1)
        return q_THQ, turned_THR[:, self.heads]


def cache_shape(blocks: int, block_size: int, width: int) -> tuple[int, ...]:
    """Blocks of slots with one key head."""
    return (blocks, block_size, 1, width)


class WriteCache(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.write = fused.ReshapeAndCache()

    def construct(self, cache: Tensor, entries_TX: Tensor, slots_T: Tensor) -> Tensor:
        return self.write(entries_TX.expand_dims(1), None, cache, None, slots_T)


class ReadCache(nn.Cell):
    def construct(self, cache: Tensor, slots_S: Tensor) -> Tensor:
        return ops.gather(cache.reshape(-1, cache.shape[3]), slots_S, 0)


class PrefillAttention(nn.Cell):
    """Values are widened to the width of the keys, which the operator asks for."""

    def __init__(self, heads: int, scale: float):
        super().__init__(auto_prefix=False)
        self.attend = fused.FlashAttentionScore(
            heads,
            scale_value=scale,
            pre_tokens=_ALL_TOKENS,
            next_tokens=0,
            input_layout="TND",
            sparse_mode=_RIGHT_DOWN_CAUSAL,
        )
        self.mask = Tensor(np.triu(np.ones((_CAUSAL_MASK, _CAUSAL_MASK), np.uint8), 1))

    def construct(
        self, q_THX: Tensor, k_SHX: Tensor, v_SHV: Tensor, query_ends_B: Tensor, key_ends_B: Tensor
    ) -> Tensor:
        heads, width = v_SHV.shape[1], v_SHV.shape[2]
        wide_SHX = ops.concat((v_SHV, ops.zeros_like(k_SHX)[:, :, width:]), -1)
        ends = query_ends_B.astype(ms.int64), key_ends_B.astype(ms.int64)
        y_THX = self.attend(q_THX, k_SHX, wide_SHX, None, None, None, self.mask, None, ends[0], ends[1])[3]
        return y_THX[:, :, :width].reshape(-1, heads * width)


class DecodeAttention(nn.Cell):
    def __init__(self, heads: int, scale: float, latent: int, block_size: int):
        super().__init__(auto_prefix=False)
        self.heads = heads
        self.latent = latent
        self.attend = fused.PagedAttention(heads, scale, 1, mla_v_dim=latent)

    def construct(self, q_THX: Tensor, cache: Tensor, tables_TM: Tensor, visible_T: Tensor) -> Tensor:
        q_TX = q_THX.reshape(-1, self.heads * q_THX.shape[2])
        y_TX = self.attend(q_TX, cache, cache, tables_TM, visible_T, None, None, None, None, None)
        return y_TX.reshape(-1, self.heads, self.latent)


class Route(nn.Cell):
    """FusedAddTopKDiv is V3's rule with several groups; the family's other rules stay plain operators."""

    def __init__(self, spec: ModelSpec):
        super().__init__(auto_prefix=False)
        self.is_v3 = spec.has_router_bias and spec.norm_topk_prob and spec.n_group > 1
        self.plain = composite.Route(spec)
        self.choose = fused.FusedAddTopKDiv()
        self.groups, self.kept_groups, self.kept = spec.n_group, spec.topk_group, spec.num_experts_per_tok
        self.factor = float(spec.routed_scaling_factor)

    def construct(self, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.is_v3:
            return self.plain(logits_TE, bias_E)
        best, sigmoid, normalise = 2, 0, True
        return self.choose(
            logits_TE, bias_E, self.groups, self.kept_groups, best, self.kept, sigmoid, normalise, self.factor
        )


class Permute(nn.Cell):
    """Rows [N, D] sorted by expert, those of other ranks' experts last, where each went [N], how many each has [E]."""

    def __init__(self, experts: int, kept: int, is_part: bool):
        super().__init__(auto_prefix=False)
        self.experts = experts
        self.numbers = experts + is_part
        self.permute = fused.MoeInitRoutingV2()

    def construct(self, x_TD: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_rows, no_capacity, drop_nothing, as_counts = 0, 0, 0, 2
        rows_ND, place_N, counts_E, _ = self.permute(
            x_TD, index_TK, all_rows, no_capacity, self.numbers, drop_nothing, as_counts, False
        )
        return rows_ND, place_N, counts_E[: self.experts].astype(ms.int64)


class Unpermute(nn.Cell):
    def __init__(self, kept: int, is_part: bool):
        super().__init__(auto_prefix=False)
        self.is_part = is_part
        self.unpermute = fused.MoeTokenUnpermute()

    def construct(self, rows_ND: Tensor, place_N: Tensor, counts_E: Tensor, weight_TK: Tensor) -> Tensor:
        if self.is_part:
            rows_ND = self.without_others(rows_ND, counts_E)
        return self.unpermute(rows_ND.astype(ms.float32), place_N, weight_TK, False, None)

    def without_others(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Zeros in the rows that no expert of this rank has written."""
        row_N = ops.arange(rows_ND.shape[0])
        is_own_N1 = (row_N < counts_E.sum()).expand_dims(1)
        return ops.select(ops.broadcast_to(is_own_N1, rows_ND.shape), rows_ND, ops.zeros_like(rows_ND))


_ONE_TENSOR, _BY_ROWS, _COUNTS, _NO_ACTIVATION = 3, 0, 1, 0  # GroupedMatmulV4's split_item and the three after it


class GroupedMatmul(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.product = fused.GroupedMatmulV4()

    def construct(self, rows_ND: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
        return self.product(
            [rows_ND], [weight_EDF], None, None, None, None, None, None, counts_E, None, None, None,
            _ONE_TENSOR, _BY_ROWS, _COUNTS, _NO_ACTIVATION, None,
        )[0]  # fmt: skip


class SwiGLU(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.activate = fused.Swiglu()

    def construct(self, x: Tensor) -> Tensor:
        return self.activate(x, -1)


class DynamicQuant(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.quantise = fused.DynamicQuantExt()

    def construct(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantise(x_TD, None)


class QuantMatmul(nn.Cell):
    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.product = fused.QuantBatchMatmul(False, True, dtype)

    def construct(self, q_TD: Tensor, scale_T: Tensor, weight_FD: Tensor, scale_F: Tensor) -> Tensor:
        return self.product(q_TD, weight_FD, scale_F, None, None, scale_T)


class QuantGroupedMatmul(nn.Cell):
    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.dtype = dtype
        self.product = fused.GroupedMatmulV4()

    def construct(
        self, q_ND: Tensor, scale_N: Tensor, weight_EDF: Tensor, scale_EF: Tensor, counts_E: Tensor
    ) -> Tensor:
        return self.product(
            [q_ND], [weight_EDF], None, [scale_EF], None, None, None, [scale_N], counts_E, None, None, None,
            _ONE_TENSOR, _BY_ROWS, _COUNTS, _NO_ACTIVATION, self.dtype,
        )[0]  # fmt: skip


class StaticQuant(nn.Cell):
    """In FP32: the operator's factor has the type of its input, and BF16 would round it to three digits."""

    def __init__(self, width: int, scale: float, offset: int):
        super().__init__(auto_prefix=False)
        self.factor, self.offset = (Tensor(np.full(width, value, np.float32)) for value in (1 / scale, offset))
        self.quantise = fused.QuantV2()

    def construct(self, x: Tensor) -> Tensor:
        return self.quantise(x.astype(ms.float32), self.factor, self.offset, False, "ROUND", ms.int8)


class StaticQuantMatmul(nn.Cell):
    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.product = fused.QuantBatchMatmul(False, True, dtype)

    def construct(self, q_TD: Tensor, weight_FD: Tensor, scale_F: Tensor, bias_F: Tensor) -> Tensor:
        return self.product(q_TD, weight_FD, scale_F, None, bias_F, None)


class AllGather(nn.Cell):
    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.gather = ops.AllGather(group.name)
        self.gather.add_prim_attr("rank_size", group.size)  # a proof on one machine has no group to ask

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.gather(x_TD)


class ReduceScatter(nn.Cell):
    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.scatter = ops.ReduceScatter(group=group.name)
        self.scatter.add_prim_attr("rank_size", group.size)

    def construct(self, x_SD: Tensor) -> Tensor:
        return self.scatter(x_SD)


_MIB = 2**20
_DISPATCH_RANKS, _DISPATCH_ROWS = (16, 32, 64), 256  # what MoeDistributeDispatch takes on a 910B, and of a rank
_DISPATCH_WIDTH, _DISPATCH_EXPERTS, _DISPATCH_HELD, _DISPATCH_KEPT = 7168, 256, 24, 8
_NOT_QUANTISED, _DYNAMIC_QUANT = 0, 2


def can_dispatch(spec: ModelSpec, ranks: int, rows: int) -> bool:
    """As documented for the 910B, whose room for what travels is HCCL_BUFFSIZE MiB for each group of ranks."""
    held, width = spec.n_routed_experts // ranks, spec.hidden_size
    room = 2 * (2 * rows * ranks * min(held, spec.num_experts_per_tok) * width + 2 * _MIB)
    return (
        soc.current() == soc.ASCEND_910B
        and ranks in _DISPATCH_RANKS
        and rows <= _DISPATCH_ROWS
        and width <= _DISPATCH_WIDTH
        and width % 32 == 0
        and spec.n_routed_experts <= _DISPATCH_EXPERTS
        and held <= _DISPATCH_HELD
        and spec.num_experts_per_tok <= _DISPATCH_KEPT
        and room <= int(os.environ.get("HCCL_BUFFSIZE", "200")) * _MIB
    )


class Dispatch(nn.Cell):
    """Rows that nothing has arrived for come last, as many as could; those of every rank are equally many."""

    def __init__(self, group: Group, spec: ModelSpec, int8: bool):
        super().__init__(auto_prefix=False)
        self.ranks, self.index, self.group = group.size, group.index, group.name
        self.experts = spec.n_routed_experts
        self.int8 = int8
        self.quant_mode = _DYNAMIC_QUANT if int8 else _NOT_QUANTISED
        self.dispatch = fused.MoeDistributeDispatch()

    def construct(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[tuple, Tensor, tuple]:
        as_counts = 1
        rows_ND, scale_N, place_N, counts_E, received, received_tp, weight_N = self.dispatch(
            x_TD, index_TK, self.ranks, self.index, self.experts, weight_TK, None, None, self.group, None,
            0, 0, 0, 0, 0, self.quant_mode, 0, as_counts,
        )  # fmt: skip
        rows = (rows_ND, scale_N) if self.int8 else (rows_ND,)
        return rows, counts_E, (index_TK, weight_TK, place_N, received, received_tp, weight_N)


class Combine(nn.Cell):
    def __init__(self, group: Group, spec: ModelSpec):
        super().__init__(auto_prefix=False)
        self.ranks, self.index, self.group = group.size, group.index, group.name
        self.experts = spec.n_routed_experts
        self.combine = fused.MoeDistributeCombine()

    def construct(self, rows_ND: Tensor, ticket: tuple) -> Tensor:
        index_TK, weight_TK, place_N, received, received_tp, weight_N = ticket
        return self.combine(
            rows_ND, index_TK, place_N, received, weight_TK, self.ranks, self.index, self.experts, received_tp,
            None, None, None, None, weight_N, self.group,
        )  # fmt: skip
