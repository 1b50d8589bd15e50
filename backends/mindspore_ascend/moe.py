"""Mixture of experts: FP32 routing, experts split between the ranks whole or by width, shared expert beside them.

Shape letters: T tokens, Q those that this rank sends, S those of all data-parallel replicas, D hidden, E experts of
this rank, K experts a token, F features of this rank, N rows as the op set lays them out for experts.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .layers import FeedForward
from .ops import OpSet
from .parallel import InPlace, JoinReplicas, OwnRows, OwnSum
from .weights import Piece, RankWeights


class Router(nn.Cell):
    """Combination weights [T, K] in FP32 and expert indices [T, K]."""

    def __init__(self, source: RankWeights, op_set: OpSet, name: str, canonical: str):
        super().__init__(auto_prefix=False)
        gate = Piece(f"{canonical}.weight")
        self.weight = source.matrix(f"{name}.dense.weight", gate, dtype=ms.float32)
        self.bias = None
        if source.spec.has_router_bias:
            bias = f"{canonical}.e_score_correction_bias"
            self.bias = source.vector(f"{name}.e_score_correction_bias", bias, dtype=ms.float32)
        self.product = ops.MatMul(transpose_b=True)
        self.route = op_set.Route(source.spec)

    def construct(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.product(x_TD.astype(ms.float32), self.weight), self.bias)


class ExpertLinear(nn.Cell):
    """Rows for experts, each times its expert's matrix; plain weights."""

    def __init__(self, op_set: OpSet, weight_EDF: Parameter):
        super().__init__(auto_prefix=False)
        self.weight_EDF = weight_EDF
        self.product = op_set.GroupedMatmul()

    def construct(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return self.multiply((rows_ND,), counts_E)

    def multiply(self, rows: tuple, counts_E: Tensor) -> Tensor:
        return self.product(*rows, self.weight_EDF, counts_E)


class QuantExpertLinear(nn.Cell):
    """The same with INT8 weights, and rows quantised as they come."""

    def __init__(self, op_set: OpSet, weight_EDF: Parameter, scale_EF: Parameter, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.weight_EDF, self.scale_EF = weight_EDF, scale_EF
        self.quantise = op_set.DynamicQuant()
        self.product = op_set.QuantGroupedMatmul(dtype)

    def construct(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return self.multiply(self.quantise(rows_ND), counts_E)

    def multiply(self, rows: tuple, counts_E: Tensor) -> Tensor:
        """``rows`` are codes and their scales."""
        return self.product(*rows, self.weight_EDF, self.scale_EF, counts_E)


def _make_experts(source: RankWeights, op_set: OpSet, name: str, canonical: str, *projections: str) -> nn.Cell:
    if source.int8:
        return QuantExpertLinear(op_set, *source.expert_codes(name, canonical, projections), source.dtype)
    return ExpertLinear(op_set, source.experts(f"{name}.weight", canonical, projections))


class MoE(nn.Cell):
    """This rank's share [T, D] of routed and shared experts, summed in FP32 and rounded once.

    Data-parallel replicas put their tokens together for the routed experts, which are split between all of their ranks;
    or each rank sends its share of single tokens to the ranks that hold their experts, and gets the sums back.
    """

    def __init__(self, source: RankWeights, op_set: OpSet, name: str, canonical: str):
        super().__init__(auto_prefix=False)
        spec, replicas = source.spec, source.mesh.dp
        routed, experts = f"{name}.routed_experts", f"{canonical}.experts"
        self.join = JoinReplicas(op_set, replicas)
        self.router = Router(source, op_set, f"{routed}.router", f"{canonical}.gate")
        self.first, self.held = source.experts_held.start, len(source.experts_held)
        self.is_part = self.held < spec.n_routed_experts
        self.permute = op_set.Permute(self.held, spec.num_experts_per_tok, self.is_part)
        self.gate_up = _make_experts(source, op_set, f"{routed}.ffn.w_gate_hidden", experts, "gate_proj", "up_proj")
        self.activate = op_set.SwiGLU()
        self.down = _make_experts(source, op_set, f"{routed}.ffn.w2", experts, "down_proj")
        self.unpermute = op_set.Unpermute(spec.num_experts_per_tok, self.is_part)
        self.own_sum = OwnSum(op_set, replicas)
        self.sends = source.mesh.ep is not None
        if source.mesh.ep is not None:
            self.own_rows, self.in_place = OwnRows(source.mesh.tp), InPlace(source.mesh.tp)
            self.dispatch = op_set.Dispatch(source.mesh.ep, spec, source.int8)
            self.combine = op_set.Combine(source.mesh.ep, spec)
        self.has_shared = spec.n_shared_experts > 0
        self.shared: Any = None
        if self.has_shared:
            self.shared = FeedForward(source, op_set, f"{name}.shared_experts", f"{canonical}.shared_experts")

    def construct(self, x_TD: Tensor, spread_P: Tensor | None, prefill: bool) -> Tensor:
        """``spread_P`` as in `parallel.JoinReplicas`; None for a single replica."""
        if self.sends and not prefill:
            y_TD = self.sent(x_TD, spread_P)
        else:
            y_TD = self.own_sum(self.routed(self.join(x_TD, spread_P)), x_TD)
        if self.has_shared:
            y_TD = y_TD + self.shared(x_TD).astype(ms.float32)
        return y_TD.astype(x_TD.dtype)

    def routed(self, x_SD: Tensor) -> Tensor:
        """What this rank's experts add to each token, FP32 [S, D]."""
        weight_SK, index_SK = self.router(x_SD)
        if self.is_part:
            index_SK = self.own_or_last(index_SK)
        rows_ND, place_N, counts_E = self.permute(x_SD, index_SK)
        rows_ND = self.down(self.activate(self.gate_up(rows_ND, counts_E)), counts_E)
        return self.unpermute(rows_ND, place_N, counts_E, weight_SK)

    def sent(self, x_TD: Tensor, spread_P: Tensor) -> Tensor:
        """All that routed experts add to this rank's share of the replica's tokens, FP32 [T, D]."""
        x_QD = self.own_rows(x_TD, spread_P)
        weight_QK, index_QK = self.router(x_QD)
        rows, counts_E, ticket = self.dispatch(x_QD, index_QK, weight_QK)
        rows_ND = self.down(self.activate(self.gate_up.multiply(rows, counts_E)), counts_E)
        return self.in_place(self.combine(rows_ND, ticket), x_TD)

    def own_or_last(self, index_SK: Tensor) -> Tensor:
        """This rank's number of each chosen expert; one past its last for all that other ranks hold."""
        own_SK = index_SK - self.first
        is_own_SK = ops.logical_and(own_SK >= 0, own_SK < self.held)
        return ops.select(is_own_SK, own_SK, ops.full_like(own_SK, self.held))
