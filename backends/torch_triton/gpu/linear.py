"""Linear layers on a GPU: FP8 weights with block scales, or BF16 ones.

Few rows run at the speed of memory (`kernels.fp8_linear`); many go to cuBLASLt where it takes these scales.

Shape letters: T tokens, N outputs, K inputs, P parts to be added.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import multiplies_blocks
from ..kernels.chips import chip_of
from ..kernels.fp8_linear import fp8_linear
from ..kernels.quant import GROUP, Codes, Normed, add_norm_quantise, quantise
from ..layers import gated
from .matrices import Fp8Matrix

Operand = Codes | Tensor  # activations: quantised or BF16
LIBRARY_ROWS = 128  # from so many rows on cuBLASLt is faster than the kernel for few


class Linear(Protocol):
    """y = x W^T without a bias."""

    def __call__(self, x: Operand) -> Tensor:
        """BF16 [T, N]."""

    def gated(self, x: Operand) -> Operand:
        """silu(gate) * up for W = [gate; up], [T, N / 2]; quantised when that is one launch less."""


class Bf16Linear:
    def __init__(self, weight_NK: Tensor):
        self._weight = weight_NK

    def __call__(self, x: Operand) -> Tensor:
        assert isinstance(x, Tensor), "BF16 weights take BF16 activations"
        return F.linear(x, self._weight)

    def gated(self, x: Operand) -> Operand:
        return gated(self(x))


class Fp8Linear:
    """``ue8m0``: scales of activations are powers of two, as this checkpoint was trained with."""

    def __init__(self, weight: Fp8Matrix, ue8m0: bool):
        self._weight = weight
        self._ue8m0 = ue8m0
        self._chip = chip_of(weight.codes.device)
        outputs, inputs = weight.codes.shape
        # cuBLASLt wants scales of four blocks at a time.
        whole = outputs % GROUP == 0 and inputs % (4 * GROUP) == 0
        self._in_library = whole and multiplies_blocks(weight.codes.device)

    def __call__(self, x: Operand) -> Tensor:
        x = self._operand(x)
        if self._in_library and isinstance(x, Codes) and _is_many(len(x.codes)):
            return _library_product(x, self._weight)
        return fp8_linear(x, *self._weight)

    def gated(self, x: Operand) -> Operand:
        x = self._operand(x)
        if self._in_library and isinstance(x, Codes) and _is_many(len(x.codes)):
            return quantise(_library_product(x, self._weight), self._ue8m0, gated=True)
        return fp8_linear(x, *self._weight, gated=True)

    def _operand(self, x: Operand) -> Operand:
        return quantise(x, self._ue8m0) if isinstance(x, Tensor) and self._chip.fp8_units else x


def _is_many(rows: int) -> bool:
    return rows >= LIBRARY_ROWS and rows % 8 == 0


def _library_product(x: Codes, weight: Fp8Matrix) -> Tensor:
    return F.scaled_mm(
        x.codes,
        weight.codes.t(),
        x.scales,
        F.ScalingType.BlockWise1x128,
        weight.scales.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


class Norm:
    """RMSNorm of residual + branch; the result in the forms that its readers want."""

    def __init__(self, weight: Tensor, eps: float, codes: bool, plain: bool, ue8m0: bool = False):
        self._weight = weight
        self._eps = eps
        self._codes = codes
        self._plain = plain or not codes
        self._ue8m0 = ue8m0

    def __call__(self, branch: Tensor, residual: Tensor | None = None) -> Normed:
        """``branch``: [T, K] or parts [T, P, K]. The sum that was normed is the result's ``residual``."""
        normed = add_norm_quantise(branch, residual, self._weight, self._eps, self._plain, self._codes, self._ue8m0)
        return normed if normed.residual is not None else normed._replace(residual=branch)


def operand(normed: Normed) -> Operand:
    """What linear layers take."""
    x = normed.plain if normed.quantised is None else normed.quantised
    assert x is not None, "a norm has at least one form"
    return x
