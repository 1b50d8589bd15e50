"""Mixture of experts: a router in FP32, experts that run on their tokens only, a shared expert.

Each rank runs the experts, or the parts of experts, that it holds, on the tokens of all data-parallel replicas.

Shape letters: T tokens, S tokens of all replicas, D hidden, E experts, G expert groups, K experts a token, N = S K
choices, R those of experts that this rank holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.routing import NORMALISE_EPSILON
from ...models.spec import ModelSpec
from .layers import Linear, SwiGLU, gated
from .plan import Plan
from .weights import TensorSource


class Router:
    """`models.routing.route` in PyTorch."""

    def __init__(self, spec: ModelSpec, source: TensorSource, prefix: str):
        self._spec = spec
        self.gate = Linear(source.read(f"{prefix}.weight", torch.float32))
        self.bias_E = source.read(f"{prefix}.e_score_correction_bias", torch.float32) if spec.has_router_bias else None

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token in ascending order, int64 [T, K], and their weights, float32 [T, K]."""
        logits_TE = self.gate(x_TD.float())
        scores_TE = _sigmoid(logits_TE) if self._spec.scoring_func == "sigmoid" else logits_TE.softmax(dim=1)
        choice_TE = scores_TE if self.bias_E is None else scores_TE + self.bias_E
        if self._spec.n_group > 1 and self._spec.topk_method != "greedy":
            choice_TE = self._limit_groups(choice_TE)
        index_TK = choice_TE.topk(self._spec.num_experts_per_tok, dim=1, sorted=False).indices.sort(dim=1).values
        return index_TK, self._weights(scores_TE.gather(1, index_TK))

    def _limit_groups(self, choice_TE: Tensor) -> Tensor:
        """Mask all but the best topk_group groups; see `models.routing` for the two variants."""
        choice_TGX = choice_TE.unflatten(1, (self._spec.n_group, -1))
        if self._spec.topk_method == "noaux_tc":
            group_TG, masked = choice_TGX.topk(2, dim=2, sorted=False).values.sum(dim=2), float("-inf")
        else:
            group_TG, masked = choice_TGX.amax(dim=2), 0.0
        kept = group_TG.topk(self._spec.topk_group, dim=1, sorted=False).indices
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept, False)
        return choice_TGX.masked_fill(dropped_TG[:, :, None], masked).flatten(1)

    def _weights(self, chosen_TK: Tensor) -> Tensor:
        spec = self._spec
        if spec.norm_topk_prob and (spec.num_experts_per_tok > 1 or spec.scales_normalised_weights):
            chosen_TK = chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + float(NORMALISE_EPSILON))
            if not spec.scales_normalised_weights:
                return chosen_TK
        return chosen_TK * spec.routed_scaling_factor


_WHOLE = 32  # numbers that PyTorch's vector loops take at a time, at most


def _sigmoid(logits_TE: Tensor) -> Tensor:
    """In rows of whole vectors: PyTorch rounds the rest of an array otherwise, and a batch says what is its rest."""
    experts = logits_TE.shape[1]
    return F.pad(logits_TE, (0, -experts % _WHOLE)).sigmoid()[:, :experts]


class MoE:
    def __init__(self, spec: ModelSpec, source: TensorSource, prefix: str):
        mesh = source.mesh
        self._replicas = mesh.dp
        self.router = Router(spec, source, f"{prefix}.gate")
        self._total = spec.n_routed_experts
        count = self._total // mesh.grid.ep
        self._first = count * mesh.position.expert_group
        self.experts = [SwiGLU(source, f"{prefix}.experts.{self._first + expert}") for expert in range(count)]
        self.shared = SwiGLU(source, f"{prefix}.shared_experts") if spec.n_shared_experts else None

    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """float32 [T, D]: the weighted sum of each token's experts, plus the shared expert.

        A part of the sum over the tensor-parallel ranks.
        """
        x_SD = self._replicas.below(x_TD, plan.replica_tokens)
        y_TD = self._replicas.own_total(self._routed(x_SD, *self.router(x_SD)), plan.replica_tokens)
        return y_TD if self.shared is None or not len(x_TD) else y_TD + self.shared(x_TD)

    def _routed(self, x_SD: Tensor, index_SK: Tensor, weight_SK: Tensor) -> Tensor:
        """Rows are sorted by expert; each expert that was chosen multiplies its rows, whose sum is taken at the end."""
        order_N = index_SK.flatten().argsort(stable=True)
        counts_E = torch.bincount(index_SK.flatten(), minlength=self._total).tolist()
        counts_here = counts_E[self._first : self._first + len(self.experts)]
        chosen = [(expert, count) for expert, count in zip(self.experts, counts_here, strict=True) if count]
        if not chosen:
            return x_SD.new_zeros(x_SD.shape, dtype=torch.float32)
        counts = [count for _, count in chosen]
        before = sum(counts_E[: self._first])
        order_R = order_N[before : before + sum(counts)]
        rows = x_SD[order_R // index_SK.shape[1]].split(counts)
        hidden = gated(torch.cat([expert.gate_up(x) for (expert, _), x in zip(chosen, rows, strict=True)])).split(
            counts
        )
        results = [expert.down(x) for (expert, _), x in zip(chosen, hidden, strict=True)]
        y_RD = torch.cat([*results, x_SD.new_zeros(1, x_SD.shape[1])])  # the last row is that of experts elsewhere
        row_N = torch.full_like(order_N, len(order_R)).scatter_(0, order_R, torch.arange(len(order_R)))
        return F.embedding_bag(row_N.view_as(index_SK), y_RD.float(), per_sample_weights=weight_SK, mode="sum")
