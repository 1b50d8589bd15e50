"""A mixture of experts on a GPU: the experts that were chosen, without asking the host which.

Shared experts are experts of the stack that every token chooses with weight 1. Widths are padded to whole blocks.

Shape letters: T tokens, P choices of a token, R = T P pairs, E experts of the stack, D hidden, I expert width,
U tiles of pairs of one expert, M pairs of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import experts as kernels
from ..kernels import grouped
from ..kernels.chips import chip_of
from ..kernels.experts import Stack, Tiles
from ..kernels.quant import quantise
from ..kernels.router import Choice
from ..layers import gated
from .linear import Operand

FEW_TOKENS = 512  # up to here one program orders the pairs, and memory is the limit


class Fp8Experts:
    """``foreign``: choices past the stack are other ranks' and add nothing here."""

    def __init__(self, stack: Stack, ue8m0: bool, foreign: bool = False):
        self._stack = stack
        self._ue8m0 = ue8m0
        self._foreign = foreign
        self._chip = chip_of(stack.gate_up.device)

    def __call__(self, x: Operand, choice: Choice) -> Tensor:
        """Each choice's result times its weight, FP32 or, of many tokens, BF16 [T, P, D]; to be added."""
        if len(choice.ids) > FEW_TOKENS:
            return self._many(x, choice)
        tiles = self._tiles(choice.ids)
        h = kernels.gate_up(x, choice.ids, self._stack, tiles)
        h_or_codes = quantise(h, self._ue8m0) if self._chip.fp8_units else h
        return kernels.down(h_or_codes, choice.ids, choice.weights, self._stack, tiles, self._foreign)

    def _tiles(self, ids_TP: Tensor) -> Tiles:
        return kernels.one_pair_tiles(ids_TP) if len(ids_TP) == 1 else kernels.group(ids_TP, len(self._stack.down))

    def _many(self, x: Operand, choice: Choice) -> Tensor:
        tokens, choices = choice.ids.shape
        stack = self._stack
        pairs = grouped.sort_pairs(choice.ids, len(stack.down), grouped.choose(self._chip).block_m)
        gate_up = grouped.grouped(grouped.gather(x, pairs, choices), stack.gate_up, stack.gate_up_scales, pairs)
        h = quantise(gate_up, self._ue8m0, gated=True) if self._chip.fp8_units else gated(gate_up)
        y = grouped.grouped(h, stack.down, stack.down_scales, pairs, choice.weights, self._foreign)
        return y.view(tokens, choices, -1)


class Bf16Experts:
    """As `Fp8Experts`."""

    def __init__(self, gate_up_EID: Tensor, down_EDI: Tensor, foreign: bool = False):
        self._foreign = foreign
        self._gate_up = gate_up_EID.transpose(1, 2)
        self._down = down_EDI.transpose(1, 2)

    def __call__(self, x: Operand, choice: Choice) -> Tensor:
        """Each choice's result times its weight, FP32 [T, P, D]; to be added."""
        assert isinstance(x, Tensor), "BF16 weights take BF16 activations"
        tokens, choices = choice.ids.shape
        sorted_R, order_R = choice.ids.flatten().sort(stable=True)
        expert_E = torch.arange(len(self._gate_up), dtype=torch.int32, device=x.device)
        ends_E = torch.searchsorted(sorted_R, expert_E, right=True, out_int32=True)
        h_RI = gated(F.grouped_mm(x[order_R // choices], self._gate_up, offs=ends_E))
        y_RD = F.grouped_mm(h_RI, self._down, offs=ends_E).float()
        y_RD *= choice.weights.flatten()[order_R, None]
        if self._foreign:
            y_RD.masked_fill_((sorted_R >= len(expert_E))[:, None], 0)
        return torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(tokens, choices, -1)
