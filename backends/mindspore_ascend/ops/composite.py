"""Every fused operator written out in plain ones: what runs on a CPU, and the definition of the fused operator.

Every expert multiplies every token, and the weights drop what was not chosen: right for small models, and the only form
with static shapes that plain operators allow. Between `Permute` and `Unpermute`, rows are therefore [E, T, ...], where
the fused operators sort a row for each choice.

Shape letters: T tokens, H heads, X cache entry (latent and rope key), C latent, N nope dim, R rope dim or ranks, Q
query (N + R), S visible positions or rows of all ranks, D hidden, E experts, K experts a token, F features, B
sequences, M blocks, G groups.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ....models.routing import NORMALISE_EPSILON
from ....models.spec import ModelSpec
from ..mesh import Group

MASKED = float("-inf")
EXACT = ms.float64  # holds every sum of INT8 products that a matrix of the family can give
SMALLEST = 1e-10  # a token of zeros has a scale
PREFILL_TOKENS = 512  # prompts run in parts of so many tokens: scores are all queries times all keys of a part


class RmsNorm(nn.Cell):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; statistics in FP32."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.astype(ms.float32)
        wide = wide * ops.rsqrt((wide * wide).mean(-1, keep_dims=True) + self.eps)
        return (wide * weight.astype(ms.float32)).astype(x.dtype)


class AddRmsNorm(nn.Cell):
    """(norm of the sum, the sum) of a block's output and the residual stream."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.norm = RmsNorm(eps)

    def construct(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.norm(total, weight), total


class Turn(nn.Cell):
    """What `Rotate` takes, made once for all layers, from FP32 tables [T, R] whose two halves are equal."""

    def __init__(self, nope: int, rope: int):
        super().__init__(auto_prefix=False)
        self.nope = nope
        self.sign_R = Tensor(np.repeat(np.array([-1, 1], np.float32), rope // 2))

    def construct(self, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors of a value and of its partner, of queries [T, 1, N + R] and of keys [T, R]."""
        partner_TR = sin_TR * self.sign_R
        still_TN = ops.zeros((cos_TR.shape[0], self.nope), ms.float32)
        query_cos_TQ = ops.concat((still_TN + 1.0, cos_TR), -1)
        query_sin_TQ = ops.concat((still_TN, partner_TR), -1)
        return query_cos_TQ.expand_dims(1), query_sin_TQ.expand_dims(1), cos_TR, partner_TR


class Rotate(nn.Cell):
    """RoPE on halves of the last R values of queries [T, H, N + R], and of keys [T, R]."""

    def __init__(self, heads: int, nope: int, rope: int):
        super().__init__(auto_prefix=False)
        partner_R = np.roll(np.arange(rope, dtype=np.int32), rope // 2)
        self.key_partner_R = Tensor(partner_R)
        self.query_partner_Q = Tensor(np.concatenate([np.arange(nope, dtype=np.int32), nope + partner_R]))

    def construct(self, q_THQ: Tensor, k_TR: Tensor, turn: tuple) -> tuple[Tensor, Tensor]:
        """``turn`` is `Turn`'s."""
        query_cos_T1Q, query_sin_T1Q, cos_TR, sin_TR = turn
        return (
            self.turned(q_THQ, self.query_partner_Q, query_cos_T1Q, query_sin_T1Q),
            self.turned(k_TR, self.key_partner_R, cos_TR, sin_TR),
        )

    def turned(self, x: Tensor, partner: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.astype(ms.float32)
        return (wide * cos + ops.gather(wide, partner, wide.ndim - 1) * sin).astype(x.dtype)


def cache_shape(blocks: int, block_size: int, width: int) -> tuple[int, ...]:
    """One row a slot: the plain operator that writes rows in place has a single index."""
    return (blocks * block_size, width)


class WriteCache(nn.Cell):
    """Store entries [T, X] in the cache's slots."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.update = ops.ScatterUpdate()

    def construct(self, cache: Tensor, entries_TX: Tensor, slots_T: Tensor) -> Tensor:
        return self.update(cache, slots_T, entries_TX)


class ReadCache(nn.Cell):
    """Entries [S, X] of the cache's slots."""

    def construct(self, cache: Tensor, slots_S: Tensor) -> Tensor:
        return ops.gather(cache, slots_S, 0)


class PrefillAttention(nn.Cell):
    """Causal attention of several sequences laid one after the other.

    The queries of sequence b end at row ``query_ends_B[b]``, its keys at ``key_ends_B[b]``; its last query sees all its
    keys, the one before it all but one, and so on.
    """

    def __init__(self, heads: int, scale: float):
        super().__init__(auto_prefix=False)
        self.scale = scale
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(
        self, q_THX: Tensor, k_SHX: Tensor, v_SHV: Tensor, query_ends_B: Tensor, key_ends_B: Tensor
    ) -> Tensor:
        """[T, H * V] from queries and keys of one width."""
        scores_HTS = self.scores(q_THX.transpose(1, 0, 2), k_SHX.transpose(1, 0, 2)).astype(ms.float32) * self.scale
        hidden_TS = self.hidden(q_THX.shape[0], k_SHX.shape[0], query_ends_B, key_ends_B)
        weights_HTS = ops.softmax(scores_HTS.masked_fill(hidden_TS.expand_dims(0), MASKED), -1).astype(v_SHV.dtype)
        y_THV = self.mix(weights_HTS, v_SHV.transpose(1, 0, 2)).transpose(1, 0, 2)
        return y_THV.reshape(-1, v_SHV.shape[1] * v_SHV.shape[2])

    def hidden(self, queries: int, keys: int, query_ends_B: Tensor, key_ends_B: Tensor) -> Tensor:
        """True where a query may not look: another sequence's keys, and later ones of its own."""
        query_T1 = ops.arange(queries).astype(ms.int32).expand_dims(1)
        key_S1 = ops.arange(keys).astype(ms.int32).expand_dims(1)
        sequence_T = (query_T1 >= query_ends_B).astype(ms.int32).sum(1)
        sequence_S = (key_S1 >= key_ends_B).astype(ms.int32).sum(1)
        query_from_end_T = query_T1.squeeze(1) - ops.gather(query_ends_B, sequence_T, 0)
        key_from_end_S = key_S1.squeeze(1) - ops.gather(key_ends_B, sequence_S, 0)
        foreign_TS = ops.not_equal(sequence_T.expand_dims(1), sequence_S.expand_dims(0))
        later_TS = key_from_end_S.expand_dims(0) > query_from_end_T.expand_dims(1)
        return ops.logical_or(foreign_TS, later_TS)


class DecodeAttention(nn.Cell):
    """Multi-query attention of single tokens on the cached latent itself (absorbed MLA)."""

    def __init__(self, heads: int, scale: float, latent: int, block_size: int):
        super().__init__(auto_prefix=False)
        self.scale = scale
        self.latent = latent
        self.block_size = block_size
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q_THX: Tensor, cache: Tensor, tables_TM: Tensor, visible_T: Tensor) -> Tensor:
        """[T, H, C]: token t sees the first ``visible_T[t]`` slots of the blocks ``tables_TM[t]``."""
        inside = ops.arange(self.block_size).astype(ms.int32)
        slots_TS = (tables_TM.expand_dims(2) * self.block_size + inside).reshape(tables_TM.shape[0], -1)
        entries_TSX = ops.gather(cache, slots_TS, 0)
        scores_THS = self.scores(q_THX, entries_TSX).astype(ms.float32) * self.scale
        beyond_TS = ops.arange(slots_TS.shape[1]).astype(ms.int32).expand_dims(0) >= visible_T.expand_dims(1)
        weights_THS = ops.softmax(scores_THS.masked_fill(beyond_TS.expand_dims(1), MASKED), -1).astype(q_THX.dtype)
        return self.mix(weights_THS, entries_TSX)[:, :, : self.latent]


class Route(nn.Cell):
    """`models.routing.route`: FP32 weights [T, K] and int32 expert indices [T, K] from FP32 logits [T, E]."""

    def __init__(self, spec: ModelSpec):
        super().__init__(auto_prefix=False)
        self.sigmoid = spec.scoring_func == "sigmoid"
        self.experts = spec.n_routed_experts
        self.kept = spec.num_experts_per_tok
        self.groups = 1 if spec.topk_method == "greedy" else spec.n_group
        self.kept_groups = spec.topk_group
        self.best_two = spec.topk_method == "noaux_tc"
        self.normalise = spec.norm_topk_prob and (self.kept > 1 or spec.scales_normalised_weights)
        self.factor = 1.0 if self.normalise and not spec.scales_normalised_weights else spec.routed_scaling_factor
        self.masked = MASKED if self.best_two else 0.0  # biased scores may be negative

    def construct(self, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        scores_TE = ops.sigmoid(logits_TE) if self.sigmoid else ops.softmax(logits_TE, -1)
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
        if self.groups > 1:
            choice_TE = self.limit_groups(choice_TE)
        _, index_TK = ops.topk(choice_TE, self.kept)
        weight_TK = ops.gather_d(scores_TE, 1, index_TK)
        if self.normalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + float(NORMALISE_EPSILON))
        return weight_TK * self.factor, index_TK

    def limit_groups(self, choice_TE: Tensor) -> Tensor:
        choice_TGX = choice_TE.reshape(-1, self.groups, self.experts // self.groups)
        group_TG = ops.topk(choice_TGX, 2)[0].sum(-1) if self.best_two else choice_TGX.max(-1)
        _, index_TK = ops.topk(group_TG, self.kept_groups)
        kept_TG = ops.one_hot(index_TK, self.groups, Tensor(1, ms.int32), Tensor(0, ms.int32)).sum(1)
        return choice_TGX.masked_fill((kept_TG == 0).expand_dims(2), self.masked).reshape(-1, self.experts)


class Permute(nn.Cell):
    """Tokens as rows for experts. Experts of other ranks have the number one past the last."""

    def __init__(self, experts: int, kept: int, is_part: bool):
        super().__init__(auto_prefix=False)
        self.experts = experts

    def construct(self, x_TD: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [1, T, D], the same for every expert, who is chosen by whom [T, K, E], and by how many [E] (int64)."""
        chosen_TKE = ops.one_hot(index_TK, self.experts, Tensor(1.0, ms.float32), Tensor(0.0, ms.float32))
        return x_TD.expand_dims(0), chosen_TKE, chosen_TKE.sum((0, 1)).astype(ms.int64)


class Unpermute(nn.Cell):
    """The inverse of `Permute`: the weighted sum [T, D] of what each token's experts made of it, in FP32."""

    def __init__(self, kept: int, is_part: bool):
        super().__init__(auto_prefix=False)
        self.product = ops.BatchMatMul()

    def construct(self, rows_ETD: Tensor, chosen_TKE: Tensor, counts_E: Tensor, weight_TK: Tensor) -> Tensor:
        weight_T1E = self.product(weight_TK.expand_dims(1), chosen_TKE)
        return self.product(weight_T1E, rows_ETD.astype(ms.float32).transpose(1, 0, 2)).squeeze(1)


class GroupedMatmul(nn.Cell):
    """Each expert's rows [E, T, D], or the same for all [1, T, D], times its matrix of [E, D, F]."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.product = ops.BatchMatMul()

    def construct(self, rows_ETD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
        if rows_ETD.shape[0] != weight_EDF.shape[0]:
            rows_ETD = ops.broadcast_to(rows_ETD, (weight_EDF.shape[0], -1, weight_EDF.shape[1]))
        return self.product(rows_ETD, weight_EDF)


class SwiGLU(nn.Cell):
    """silu(gate) * up of [gate | up] on the last axis."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.halves = ops.Split(-1, 2)

    def construct(self, x: Tensor) -> Tensor:
        gate, up = self.halves(x)
        return gate * ops.sigmoid(gate) * up


class DynamicQuant(nn.Cell):
    """INT8 codes [..., D] and FP32 scales [...]: each row's largest value becomes 127."""

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.astype(ms.float32)
        scale = ops.maximum(wide.abs().max(-1, keepdims=True), SMALLEST) / 127
        return ops.round(wide / scale).astype(ms.int8), scale.squeeze(-1)


class QuantMatmul(nn.Cell):
    """Codes [T, D] times codes [F, D], summed exactly, times both scales."""

    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.dtype = dtype
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, q_TD: Tensor, scale_T: Tensor, weight_FD: Tensor, scale_F: Tensor) -> Tensor:
        total_TF = self.product(q_TD.astype(EXACT), weight_FD.astype(EXACT)).astype(ms.float32)
        return (total_TF * scale_T.expand_dims(1) * scale_F.astype(ms.float32)).astype(self.dtype)


class QuantGroupedMatmul(nn.Cell):
    """`GroupedMatmul` of codes: rows with scales [E, T] or [1, T], stacks [E, D, F] with scales [E, F]."""

    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.dtype = dtype
        self.product = GroupedMatmul()

    def construct(
        self, q_ETD: Tensor, scale_ET: Tensor, weight_EDF: Tensor, scale_EF: Tensor, counts_E: Tensor
    ) -> Tensor:
        total_ETF = self.product(q_ETD.astype(EXACT), weight_EDF.astype(EXACT), counts_E).astype(ms.float32)
        scale_E1F = scale_EF.astype(ms.float32).expand_dims(1)
        return (total_ETF * scale_ET.expand_dims(2) * scale_E1F).astype(self.dtype)


class StaticQuant(nn.Cell):
    """INT8 codes clip(round(x / scale + offset), -128, 127)."""

    def __init__(self, width: int, scale: float, offset: int):
        super().__init__(auto_prefix=False)
        self.scale = scale
        self.offset = float(offset)

    def construct(self, x: Tensor) -> Tensor:
        return ops.round(x.astype(ms.float32) / self.scale + self.offset).clamp(-128.0, 127.0).astype(ms.int8)


class StaticQuantMatmul(nn.Cell):
    """Codes [T, D] times codes [F, D], summed exactly with an INT32 bias [F], times the scale [F] of both."""

    def __init__(self, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.dtype = dtype
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, q_TD: Tensor, weight_FD: Tensor, scale_F: Tensor, bias_F: Tensor) -> Tensor:
        total_TF = self.product(q_TD.astype(EXACT), weight_FD.astype(EXACT)) + bias_F.astype(EXACT)
        return (total_TF.astype(ms.float32) * scale_F).astype(self.dtype)


class AllGather(nn.Cell):
    """The ranks' rows below each other, [T, D] to [R * T, D]: a sum in which each rank fills its own place."""

    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.ranks = group.size
        self.place_R11 = Tensor(np.eye(group.size, dtype=np.float32)[group.index].reshape(-1, 1, 1))
        self.add = ops.AllReduce(group=group.name)

    def construct(self, x_TD: Tensor) -> Tensor:
        placed_RTD = x_TD.expand_dims(0) * self.place_R11.astype(x_TD.dtype)
        return self.add(placed_RTD).reshape(-1, x_TD.shape[1])


class ReduceScatter(nn.Cell):
    """This rank's rows [T, D] of the sum of the ranks' [R * T, D]."""

    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.ranks = group.size
        self.index = group.index
        self.add = ops.AllReduce(group=group.name)

    def construct(self, x_SD: Tensor) -> Tensor:
        return self.add(x_SD).reshape(self.ranks, -1, x_SD.shape[1])[self.index]


def can_dispatch(spec: ModelSpec, ranks: int, rows: int) -> bool:
    """Whether `Dispatch` and `Combine` take up to ``rows`` rows from each of ``ranks`` ranks: plain ones always do."""
    return True


class Dispatch(nn.Cell):
    """Send tokens, each rank its own, to the ranks of ``group`` that hold their experts, in equal parts and in order.

    All rows of all ranks are gathered here, and experts elsewhere get the number one past the last.
    """

    def __init__(self, group: Group, spec: ModelSpec, int8: bool):
        super().__init__(auto_prefix=False)
        self.held, self.kept = spec.n_routed_experts // group.size, spec.num_experts_per_tok
        self.first = group.index * self.held
        self.gather = AllGather(group)
        self.permute = Permute(self.held, self.kept, is_part=True)
        self.int8 = int8
        self.quantise = DynamicQuant()

    def construct(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[tuple, Tensor, tuple]:
        """`Permute`'s rows for this rank's experts, or their codes and scales; counts [E]; a ticket for `Combine`."""
        hidden, dtype = x_TD.shape[1], x_TD.dtype
        sent_TX = ops.concat((x_TD.astype(ms.float32), index_TK.astype(ms.float32), weight_TK), -1)
        all_SX = self.gather(sent_TX)
        own_SK = all_SX[:, hidden : hidden + self.kept].astype(ms.int32) - self.first
        is_own_SK = ops.logical_and(own_SK >= 0, own_SK < self.held)
        own_SK = ops.select(is_own_SK, own_SK, ops.full_like(own_SK, self.held))
        rows_ND, place_N, counts_E = self.permute(all_SX[:, :hidden].astype(dtype), own_SK)
        ticket = place_N, counts_E, all_SX[:, hidden + self.kept :]
        return (self.quantise(rows_ND) if self.int8 else (rows_ND,)), counts_E, ticket


class Combine(nn.Cell):
    """The way back: each token's weighted sum over its experts [T, D], on the rank that sent it.

    In the type of the rows, to which the fused operator rounds its sums.
    """

    def __init__(self, group: Group, spec: ModelSpec):
        super().__init__(auto_prefix=False)
        self.unpermute = Unpermute(spec.num_experts_per_tok, is_part=True)
        self.scatter = ReduceScatter(group)

    def construct(self, rows_ND: Tensor, ticket: tuple) -> Tensor:
        place_N, counts_E, weight_SK = ticket
        return self.scatter(self.unpermute(rows_ND, place_N, counts_E, weight_SK)).astype(rows_ND.dtype)
