"""A mixture of experts on a GPU: the experts that were chosen, without asking the host which.

Shared experts are experts of the stack that every token chooses with weight 1, or layers of their own, where `loader`
says so. Widths are padded to whole blocks.

Shape letters: T tokens, P choices of a token, R = T P pairs, E experts of the stack, D hidden, I expert width,
U tiles of pairs of one expert, M pairs of a tile.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ..kernels import experts as kernels
from ..kernels import grouped
from ..kernels.chips import chip_of
from ..kernels.combine import add_parts, add_sorted
from ..kernels.experts import Stack
from ..kernels.gate import gate
from ..kernels.pairs import Sorted, gather, sort_pairs
from ..kernels.router import Choice
from .linear import Form, Operand

_TILE = 64  # of sorted pairs, which the library's products do not read
FEW_TOKENS = 512  # up to here one program orders the pairs, and memory is the limit


class Experts(Protocol):
    """``x``: in ``form``, or BF16. ``shared``: how many experts at the stack's end every token is to choose."""

    form: Form
    shared: int

    def __call__(self, x: Operand, choice: Choice, beside_TD: Tensor | None = None) -> Tensor:
        """Each choice's result times its weight, FP32 or, of many tokens, BF16 [T, P, D]; to be added. P may be 1.

        Or their sum [T, D]. ``beside_TD``, of other layers, is added as well.
        """


class KernelExperts:
    """Stacks of quantised matrices. ``foreign``: choices past them are other ranks' and add nothing here; ``part`` of
    all routed experts are in the stacks.
    """

    def __init__(self, stack: Stack, form: Form, shared: int, foreign: bool = False, part: float = 1.0):
        self._stack = stack
        self.form = form
        self.shared = shared
        self._foreign = foreign
        self._part = part
        self._chip = chip_of(stack.gate_up.codes.device)

    def __call__(self, x: Operand, choice: Choice, beside_TD: Tensor | None = None) -> Tensor:
        x = self.form.of(x)
        tokens, experts = len(choice.ids), len(self._stack.down.codes)
        if tokens == 1:
            return self._few(x, choice, beside_TD)
        y_TPD = self._few(x, choice) if tokens <= FEW_TOKENS else self._many(x, choice)
        if not self._foreign and beside_TD is None:
            return y_TPD
        return add_parts(y_TPD, choice.ids if self._foreign else None, experts, beside_TD)

    def _few(self, x: Operand, choice: Choice, beside_TD: Tensor | None = None) -> Tensor:
        ids_TP, stack = choice.ids, self._stack
        config = kernels.choose(ids_TP, stack, self._chip, self._part)
        tiles = kernels.group(ids_TP, len(stack.down.codes), config)
        h = self.form.of(kernels.gate_up(x, ids_TP, stack, tiles, config))
        return kernels.down(h, ids_TP, choice.weights, stack, tiles, self._foreign, config, beside_TD)

    def _many(self, x: Operand, choice: Choice) -> Tensor:
        tokens, choices = choice.ids.shape
        down = self._stack.down
        experts = len(down.codes)
        own = int(self._part * choice.ids.numel())  # where tokens choose evenly
        config = grouped.choose_for_experts(own, self._stack, self._chip)
        pairs = sort_pairs(choice.ids, experts, config.block_m, self._foreign)
        h = self._joined(gather(x, pairs, choices), pairs, config)
        return grouped.grouped(h, down, pairs, choice.weights, config).view(tokens, choices, -1)

    def _joined(self, x: Operand, pairs: Sorted, config: grouped.Config) -> Operand:
        """silu(gate) * up: of the product, where its kernel can, or else of what brings it into the form."""
        gated = config.has_tasks
        product = grouped.grouped(x, self._stack.gate_up, pairs, config=config, gated=gated)
        return self.form.of(product, pairs.own_1) if gated else self.form.gated(product, pairs.own_1)


class Bf16Experts:
    """As `KernelExperts`, with a library's products; gives the sum in FP32."""

    form = Form()

    def __init__(self, gate_up_EID: Tensor, down_EDI: Tensor, shared: int, foreign: bool = False):
        self.shared = shared
        self._foreign = foreign
        self._gate_up = gate_up_EID.transpose(1, 2)
        self._down = down_EDI.transpose(1, 2)

    def __call__(self, x: Operand, choice: Choice, beside_TD: Tensor | None = None) -> Tensor:
        assert isinstance(x, Tensor), "BF16 weights take BF16 activations"
        experts = len(self._gate_up)
        pairs = sort_pairs(choice.ids, experts, _TILE, self._foreign)
        x_RD = gather(x, pairs, choice.ids.shape[1])
        assert isinstance(x_RD, Tensor)
        h_RI = gate(F.grouped_mm(x_RD, self._gate_up, offs=pairs.ends_E), pairs.own_1)
        y_RD = F.grouped_mm(h_RI, self._down, offs=pairs.ends_E)
        ids_TP = choice.ids if self._foreign else None
        return add_sorted(y_RD, pairs.place_R, choice.weights, ids_TP, experts, beside_TD)
