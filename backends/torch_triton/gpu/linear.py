"""Linear layers on a GPU, and the norms before them, in every format of weights.

Few rows run at the speed of memory (`kernels.few_rows`); many go to cuBLASLt where it takes the scales of FP8 blocks,
or else through `kernels.grouped`, as a stack of one matrix.

Shape letters: T tokens, N outputs, K inputs, P parts to be added.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import multiplies_blocks
from ..kernels import norm
from ..kernels.combine import add_parts
from ..kernels.decoded import decoded
from ..kernels.few_rows import few_rows
from ..kernels.gate import gate
from ..kernels.grouped import one_matrix
from ..kernels.int8 import quantise_rows
from ..kernels.norm import Normed, add_norm_quantise
from ..kernels.quant import GROUP, Codes, quantise
from ..kernels.weights import Fp8Weight, Int4Weight, Weight
from ..parallel import ALONE, Group

Operand = Codes | Tensor  # activations: quantised or BF16
MANY_ROWS = 128  # from so many rows on the kernel for few is not the fastest


class Form(NamedTuple):
    """How activations go into a layer: as FP8 or INT8 codes, or in BF16. ``ue8m0``: FP8 scales are powers of two."""

    codes: str | None = None
    ue8m0: bool = False

    def of(self, x: Operand, rows_1: Tensor | None = None) -> Operand:
        """``x`` in this form, in which it may be already; only so many of its rows, where ``rows_1`` says so."""
        if self.codes is None or isinstance(x, Codes):
            return x
        return self._quantised(x, False, rows_1)

    def gated(self, gate_up: Tensor, rows_1: Tensor | None = None) -> Operand:
        """silu(gate) * up of [gate | up] in this form."""
        return gate(gate_up, rows_1) if self.codes is None else self._quantised(gate_up, True, rows_1)

    def _quantised(self, x: Tensor, is_gated: bool, rows_1: Tensor | None) -> Codes:
        if self.codes == "fp8":
            return quantise(x, self.ue8m0, is_gated, rows_1)
        return quantise_rows(x, is_gated, rows_1)


class Linear(Protocol):
    """y = x W^T without a bias. ``x``: in ``form``, or BF16."""

    form: Form

    def __call__(self, x: Operand) -> Tensor:
        """BF16 [T, N]."""

    def gated(self, x: Operand) -> Operand:
        """silu(gate) * up for W = [gate; up], [T, N / 2]; quantised when that is one launch less."""


class Bf16Linear:
    form = Form()

    def __init__(self, weight_NK: Tensor):
        self._weight = weight_NK

    def __call__(self, x: Operand) -> Tensor:
        assert isinstance(x, Tensor), "BF16 weights take BF16 activations"
        return F.linear(x, self._weight)

    def gated(self, x: Operand) -> Operand:
        return gate(self(x))


class KernelLinear:
    """A quantised matrix and the kernels of its format."""

    def __init__(self, weight: Weight, form: Form):
        self._weight = weight
        self.form = form

    def __call__(self, x: Operand) -> Tensor:
        x = self.form.of(x)
        return one_matrix(x, self._weight) if _rows(x) >= MANY_ROWS else few_rows(x, self._weight)

    def gated(self, x: Operand) -> Operand:
        x = self.form.of(x)
        if _rows(x) >= MANY_ROWS:
            return self.form.gated(one_matrix(x, self._weight))
        return few_rows(x, self._weight, gated=True)


class Int4Linear(KernelLinear):
    """Many rows are multiplied with weights in BF16 by a library."""

    def __init__(self, weight: Int4Weight):
        super().__init__(weight, Form())
        self._int4 = weight

    def __call__(self, x: Operand) -> Tensor:
        assert isinstance(x, Tensor), "INT4 weights take BF16 activations"
        return F.linear(x, decoded(self._int4)) if len(x) >= MANY_ROWS else few_rows(x, self._int4)

    def gated(self, x: Operand) -> Operand:
        assert isinstance(x, Tensor), "INT4 weights take BF16 activations"
        return gate(self(x)) if len(x) >= MANY_ROWS else few_rows(x, self._int4, gated=True)


class Fp8Linear:
    """FP8 blocks, which cuBLASLt multiplies on some chips."""

    def __init__(self, weight: Fp8Weight, form: Form):
        self._weight = weight
        self.form = form
        outputs, inputs = weight.codes.shape
        # cuBLASLt wants scales of four blocks at a time.
        whole = outputs % GROUP == 0 and inputs % (4 * GROUP) == 0
        self._in_library = whole and multiplies_blocks(weight.codes.device)

    def __call__(self, x: Operand) -> Tensor:
        x = self.form.of(x)
        if self._in_library and isinstance(x, Codes) and _suits_library(len(x.codes)):
            return _library_product(x, self._weight)
        return few_rows(x, self._weight)

    def gated(self, x: Operand) -> Operand:
        x = self.form.of(x)
        if self._in_library and isinstance(x, Codes) and _suits_library(len(x.codes)):
            return self.form.gated(_library_product(x, self._weight))
        return few_rows(x, self._weight, gated=True)


class Beside:
    """Layers with the same input that cannot be one: their outputs beside each other."""

    def __init__(self, layers: list[Linear]):
        self._layers = layers
        forms = {layer.form for layer in layers}
        self.form = forms.pop() if len(forms) == 1 else Form()

    def __call__(self, x: Operand) -> Tensor:
        return torch.cat([layer(x) for layer in self._layers], dim=1)

    def gated(self, x: Operand) -> Operand:
        return gate(self(x))


def _rows(x: Operand) -> int:
    return len(x.codes if isinstance(x, Codes) else x)


def _suits_library(rows: int) -> bool:
    return rows >= MANY_ROWS and rows % 8 == 0


def _library_product(x: Codes, weight: Fp8Weight) -> Tensor:
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
    """RMSNorm of residual + branch, in the form that its readers take; ``plain``: and in BF16."""

    def __init__(self, weight: Tensor, eps: float, form: Form, plain: bool):
        self._weight = weight
        self._eps = eps
        self._form = form
        self._plain = plain or form.codes is None

    def __call__(self, branch: Tensor, residual: Tensor | None = None, ranks: Group = ALONE.tp) -> Normed:
        """``branch``: [T, K] or parts [T, P, K], and of several ``ranks`` each one's share of it.

        The sum that was normed is the result's ``residual``.
        """
        form, peers = self._form, ranks.peers
        if peers is not None and not norm.takes(branch, peers):
            peers = None
        if peers is None:
            branch = ranks_total(branch, ranks)
        normed = add_norm_quantise(
            branch, residual, self._weight, self._eps, self._plain, form.codes, form.ue8m0, peers
        )  # fmt: skip
        return normed if normed.residual is not None else normed._replace(residual=branch)


def ranks_total(branch: Tensor, ranks: Group) -> Tensor:
    """``branch``, or of several ranks BF16 [T, K], the sum of theirs: parts are added before they travel."""
    if ranks.size == 1:
        return branch
    return ranks.total(add_parts(branch) if branch.dim() == 3 else branch.bfloat16().contiguous())


def operand(normed: Normed) -> Operand:
    """What linear layers take."""
    x = normed.plain if normed.quantised is None else normed.quantised
    assert x is not None, "a norm has at least one form"
    return x
