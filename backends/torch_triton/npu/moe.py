"""Feed-forward layers with an NPU's operators: SwiGLU, and the mixture of experts.

Each rank runs the experts, or the parts of experts, that it holds, on the tokens of all data-parallel replicas.

Shape letters as in `operators`; U tokens of all replicas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operators
from .weights import DeviceWeights, Piece


class SwiGLU:
    """down(silu(gate(x)) * up(x)), or this rank's part of that sum; gate and up are one matrix."""

    def __init__(self, operators: Operators, source: DeviceWeights, prefix: str):
        self._operators = operators
        gate_up = Piece(f"{prefix}.gate_proj.weight"), Piece(f"{prefix}.up_proj.weight")
        self._gate_up = source.linear(operators, *gate_up)
        self._down = source.linear(operators, Piece(f"{prefix}.down_proj.weight"))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down(self._operators.swiglu(self._gate_up(x_TD)))


class MoE:
    def __init__(self, operators: Operators, source: DeviceWeights, prefix: str):
        spec, mesh = source.spec, source.mesh
        self._operators, self._spec = operators, spec
        self._replicas = mesh.dp
        self._gate_ED = source.read(f"{prefix}.gate.weight", torch.float32)
        bias = f"{prefix}.gate.e_score_correction_bias"
        self._bias_E = source.read(bias, torch.float32) if spec.has_router_bias else None
        self._held = spec.n_routed_experts // mesh.grid.ep
        self._first = self._held * mesh.position.expert_group
        self._is_part = mesh.grid.ep > 1
        prefixes = [f"{prefix}.experts.{self._first + expert}" for expert in range(self._held)]
        self._gate_up = source.experts(prefixes, "gate_proj", "up_proj")
        self._down = source.experts(prefixes, "down_proj")
        self._shared = SwiGLU(operators, source, f"{prefix}.shared_experts") if spec.n_shared_experts else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D]: the weighted sum of each token's experts, taken in FP32, plus the shared expert.

        A part of the sum over the tensor-parallel ranks.
        """
        counts = [len(x_TD)] * self._replicas.size
        x_UD = self._replicas.below(x_TD, counts)
        y_UD = self._routed(x_UD)
        y_TD = y_UD if self._replicas.size == 1 else self._replicas.own_total(y_UD.to(x_TD.dtype), counts)
        return (y_TD if self._shared is None else y_TD + self._shared(x_TD)).to(x_TD.dtype)

    def _routed(self, x_UD: Tensor) -> Tensor:
        """float32 [U, D]: what the experts of this rank add."""
        operators = self._operators
        logits_UE = F.linear(x_UD.float(), self._gate_ED)
        weight_UK, ids_UK = operators.choose_experts(logits_UE, self._bias_E, self._spec)
        permute = operators.permute if self._gate_up.scale is None else operators.permute_quantised
        rows_PD, places, counts_E, scale_P = permute(x_UD, self._own(ids_UK), self._held + self._is_part)
        counts_E = counts_E[: self._held]
        hidden_PI = operators.swiglu(self._gate_up(operators, rows_PD, scale_P, counts_E))
        scale_P = None
        if self._down.scale is not None:
            hidden_PI, scale_P = operators.dynamic_quant(hidden_PI)
        y_PD = self._down(operators, hidden_PI, scale_P, counts_E)
        if self._is_part:
            is_own_P = torch.arange(len(y_PD), device=y_PD.device) < counts_E.sum()
            y_PD = torch.where(is_own_P[:, None], y_PD, 0)
        return operators.unpermute(y_PD, places, weight_UK)

    def _own(self, ids_UK: Tensor) -> Tensor:
        """Numbers in this rank's stack. Experts elsewhere have the number one past it, so their rows are the last."""
        if not self._is_part:
            return ids_UK
        own_UK = ids_UK - self._first
        return torch.where((own_UK >= 0) & (own_UK < self._held), own_UK, self._held).int()
