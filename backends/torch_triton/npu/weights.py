"""From the seam's numpy arrays to matrices on a device: BF16, or INT8 with a scale for each channel.

Shape letters: T tokens, I inputs, F outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.holding import Holding, is_low_bit
from ....models.quantise import quantise_int8_channels
from ....models.spec import ModelSpec
from ...base import Weights
from ..layers import adjacent_pairs
from ..parallel import Mesh
from ..weights import TensorSource
from .operators import Operators


class Piece(NamedTuple):
    """A parameter whose rows may be reordered so that pairs to be rotated are adjacent: see `layers.adjacent_pairs`."""

    name: str
    rope_block: int | None = None


class Linear:
    """x W^T."""

    def __init__(self, weight_FI: Tensor):
        self._weight = weight_FI

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self._weight)


class QuantLinear:
    """x W^T with INT8 weights, and activations quantised token by token as they come."""

    def __init__(self, operators: Operators, codes_IF: Tensor, scale_F: Tensor):
        self._operators = operators
        self._codes, self._scale = codes_IF, scale_F

    def __call__(self, x_TI: Tensor) -> Tensor:
        codes_TI, scale_T = self._operators.dynamic_quant(x_TI)
        return self._operators.quant_matmul(codes_TI, scale_T, self._codes, self._scale, x_TI.dtype)


class Stack(NamedTuple):
    """Matrices of experts, [E, I, F]. Codes have scales [E, F] in the dtype of activations."""

    weight: Tensor
    scale: Tensor | None = None

    def __call__(self, operators: Operators, rows_PI: Tensor, scale_P: Tensor | None, counts_E: Tensor) -> Tensor:
        """[P, F]: rows in groups, one for each expert; of INT8 rows there are scales."""
        if self.scale is None:
            return operators.grouped_matmul(rows_PI, self.weight, counts_E)
        assert scale_P is not None, "rows are quantised where weights are"
        return operators.quant_grouped_matmul(rows_PI, scale_P, self.weight, self.scale, counts_E)


class DeviceWeights(TensorSource):
    """What this rank of ``mesh`` holds of the parameters of ``spec``, in ``dtype`` on ``device``.

    Linear weights that ``holding`` has in INT8 are codes, those of the checkpoint where it has them.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, device: torch.device, mesh: Mesh, holding: Holding
    ):
        super().__init__(spec, weights, dtype, mesh)
        self.spec, self.device = spec, device
        self._holding = holding

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return super().read(name, dtype).to(self.device)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """INT8 [F, I] and float32 scales [F] of this rank's part."""
        shard = self.shard(name)
        stored = self._weights.int8_channels(name, shard.rows, shard.cols)
        if stored is None:
            codes_FI, scale_F1 = quantise_int8_channels(super().read(name, torch.float32).numpy())
            stored = codes_FI, scale_F1[:, 0]
        codes, scale = (torch.from_numpy(np.require(part, requirements=["C", "W"])) for part in stored)
        return codes.to(self.device), scale.to(self.device)

    def linear(self, operators: Operators, *pieces: Piece) -> Linear | QuantLinear:
        """Matrices of one input below each other, as one product."""
        if not self._is_quantised([piece.name for piece in pieces]):
            return Linear(torch.cat([self._paired(piece, self.read(piece.name)) for piece in pieces]))
        codes, scales = zip(*(self.codes(piece.name) for piece in pieces), strict=True)
        codes_FI = torch.cat([self._paired(piece, part) for piece, part in zip(pieces, codes, strict=True)])
        scale_F1 = torch.cat([self._paired(piece, part[:, None]) for piece, part in zip(pieces, scales, strict=True)])
        return QuantLinear(operators, codes_FI.t().contiguous(), scale_F1[:, 0].contiguous())

    def _paired(self, piece: Piece, rows_FX: Tensor) -> Tensor:
        return rows_FX if piece.rope_block is None else adjacent_pairs(self.spec, rows_FX, piece.rope_block)

    def experts(self, prefixes: Sequence[str], *projections: str) -> Stack:
        """Each expert's projections of one input beside each other."""
        names = [[f"{prefix}.{projection}.weight" for projection in projections] for prefix in prefixes]
        parts, inputs = self.shard(names[0][0]).shape
        shape = len(names), inputs, parts * len(projections)
        if not self._is_quantised([name for own in names for name in own]):
            stack = Stack(torch.empty(shape, dtype=self.dtype, device=self.device))
            for expert, own in enumerate(names):
                stack.weight[expert].copy_(torch.cat([self.read(name) for name in own]).t())
            return stack
        weight_EIF = torch.empty(shape, dtype=torch.int8, device=self.device)
        scale_EF = torch.empty(shape[0], shape[2], dtype=self.dtype, device=self.device)
        for expert, own in enumerate(names):
            codes, scales = zip(*(self.codes(name) for name in own), strict=True)
            weight_EIF[expert].copy_(torch.cat(codes).t())
            scale_EF[expert].copy_(torch.cat(scales))
        return Stack(weight_EIF, scale_EF)

    def _is_quantised(self, names: Sequence[str]) -> bool:
        """Whether all of them are INT8; where one is not, none is: they are one product."""
        return all(is_low_bit(self.shard(name).param) and self._holding.of(name).dtype == "w8a8" for name in names)
