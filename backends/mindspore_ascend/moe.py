"""Mixture of experts: FP32 routing, experts split by width between the ranks, shared expert beside them.

Shape letters: T tokens, D hidden, E experts, K experts a token, F features of this rank, N rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from .layers import FeedForward
from .ops import OpSet
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


class MoE(nn.Cell):
    """This rank's share [T, D] of routed and shared experts, summed in FP32 and rounded once."""

    def __init__(self, source: RankWeights, op_set: OpSet, name: str, canonical: str):
        super().__init__(auto_prefix=False)
        spec = source.spec
        self.router = Router(source, op_set, f"{name}.routed_experts.router", f"{canonical}.gate")
        experts = f"{canonical}.experts"
        self.gate_up_EDF = source.experts(
            f"{name}.routed_experts.ffn.w_gate_hidden.weight", experts, ("gate_proj", "up_proj")
        )
        self.down_EFD = source.experts(f"{name}.routed_experts.ffn.w2.weight", experts, ("down_proj",))
        self.permute = op_set.Permute(spec.n_routed_experts, spec.num_experts_per_tok)
        self.multiply, self.multiply_back = op_set.GroupedMatmul(), op_set.GroupedMatmul()
        self.activate = op_set.SwiGLU()
        self.unpermute = op_set.Unpermute(spec.num_experts_per_tok)
        self.has_shared = spec.n_shared_experts > 0
        self.shared: Any = None
        if self.has_shared:
            self.shared = FeedForward(source, op_set, f"{name}.shared_experts", f"{canonical}.shared_experts")

    def construct(self, x_TD: Tensor) -> Tensor:
        weight_TK, index_TK = self.router(x_TD)
        rows_ND, place_N, counts_E = self.permute(x_TD, index_TK)
        rows_NF = self.activate(self.multiply(rows_ND, self.gate_up_EDF, counts_E))
        rows_ND = self.multiply_back(rows_NF, self.down_EFD, counts_E)
        y_TD = self.unpermute(rows_ND, place_N, weight_TK)
        if self.has_shared:
            y_TD = y_TD + self.shared(x_TD).astype(ms.float32)
        return y_TD.astype(x_TD.dtype)
