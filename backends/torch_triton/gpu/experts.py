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
from ..kernels.chips import Chip, chip_of
from ..kernels.experts import Config, Stack, Tiles
from ..kernels.quant import quantise
from ..kernels.router import Choice
from ..layers import gated
from .linear import Operand

_FEW_TOKENS = 512  # up to here one program orders the pairs


class Fp8Experts:
    def __init__(self, stack: Stack, ue8m0: bool):
        self._stack = stack
        self._ue8m0 = ue8m0
        self._chip = chip_of(stack.gate_up.device)

    def __call__(self, x: Operand, choice: Choice) -> Tensor:
        """Each choice's result times its weight, FP32 [T, P, D]; to be added."""
        config = choose(len(choice.ids), self._chip)
        tiles = self._tiles(choice.ids, config)
        h = kernels.gate_up(x, choice.ids, self._stack, tiles, config)
        h_or_codes = quantise(h, self._ue8m0) if self._chip.fp8_units else h
        return kernels.down(h_or_codes, choice.ids, choice.weights, self._stack, tiles, config=config)

    def _tiles(self, ids_TP: Tensor, config: Config) -> Tiles:
        if len(ids_TP) == 1:
            return kernels.one_pair_tiles(ids_TP, config)
        experts = len(self._stack.gate_up)
        if len(ids_TP) <= _FEW_TOKENS:
            return kernels.group(ids_TP, experts, config)
        return sorted_tiles(ids_TP, experts, config.block_m)


def choose(tokens: int, chip: Chip) -> Config:
    """The kernels' own choice for decoding, large tiles for prompts."""
    if tokens <= 1024 or chip.shared_memory < 160 << 10:
        return kernels.choose(tokens, chip)
    return Config(128, 64, 4, 128, 4, warps=8)


def sorted_tiles(ids_TP: Tensor, experts: int, block_m: int) -> Tiles:
    """`kernels.experts.group` for any number of pairs."""
    pairs = ids_TP.numel()
    sorted_R, order_R = ids_TP.flatten().sort(stable=True)
    edges = torch.searchsorted(sorted_R, torch.arange(experts + 1, dtype=torch.int32, device=ids_TP.device))
    start_E, count_E = edges[:-1], edges.diff()
    tiles_E = (count_E + block_m - 1) // block_m
    end_E = tiles_E.cumsum(0)
    tile_U = torch.arange(min(pairs, min(experts, pairs) + pairs // block_m), device=ids_TP.device)
    expert_U = torch.searchsorted(end_E, tile_U, right=True)
    used_U = expert_U < experts
    expert_U = expert_U.clamp(max=experts - 1)
    first_U = (tile_U - (end_E - tiles_E)[expert_U]) * block_m
    rows_U = (count_E[expert_U] - first_U).clamp(max=block_m)
    slot_UM = (start_E[expert_U] + first_U)[:, None] + torch.arange(block_m, device=ids_TP.device)
    pair_UM = order_R[slot_UM.clamp(max=pairs - 1)]
    return Tiles(expert_U.where(used_U, -1).int(), rows_U.int(), pair_UM.int())


class Bf16Experts:
    def __init__(self, gate_up_EID: Tensor, down_EDI: Tensor):
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
        return torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(tokens, choices, -1)
