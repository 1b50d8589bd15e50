"""From parameters to the layers of the model: stacked, padded to whole scale blocks, in the run's precision.

Shape letters: N rows (out), K columns (in), D hidden, I expert width, E experts and shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ....models.quant import block_grid
from ....models.spec import ModelSpec
from ..kernels.chips import chip_of
from ..kernels.experts import Stack
from ..kernels.quant import quantise
from ..layers import adjacent_pairs
from ..parallel import Mesh
from .attention import Projections
from .experts import Bf16Experts, Fp8Experts
from .linear import Bf16Linear, Fp8Linear, Linear, Norm, Operand
from .matrices import Fp8Matrix, below, dequantise_blocks, pad, pad_fp8, quantise_blocks, whole_blocks
from .source import DeviceTensors

Reorder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """A matrix of a layer; ``reorder`` moves its rows, and ``columns`` is the width that its input is padded to."""

    name: str
    reorder: Reorder | None = None
    columns: int | None = None


class Loader:
    """``fp8``: hold linear weights as FP8 codes; otherwise in BF16."""

    def __init__(self, spec: ModelSpec, source: DeviceTensors, fp8: bool):
        self.spec = spec
        self.source = source
        self._fp8 = fp8
        self._quantises = fp8 and chip_of(source.device).fp8_units
        self._ue8m0 = spec.fp8 is not None and spec.fp8.scale_fmt == "ue8m0"
        grid = source.mesh.grid
        self._heads = spec.num_attention_heads // grid.tp
        self._dense_width = spec.intermediate_size // grid.tp
        self.experts_held = held_experts(spec, source.mesh)
        # choices that this rank has nothing to do with: experts elsewhere, shared ones of other replicas' tokens
        elsewhere = len(self.experts_held) < spec.n_routed_experts
        self.has_foreign = elsewhere or (grid.dp > 1 and spec.n_shared_experts > 0)
        self._expert_width = spec.moe_intermediate_size // grid.expert_slices
        self._shared_width = spec.shared_intermediate_size // grid.tp
        self.shared_pieces = -(-self._shared_width // max(1, self._expert_width)) if spec.n_shared_experts else 0

    def operand(self, x_TK: Tensor) -> Operand:
        """BF16 activations as this model's linear layers take them."""
        return quantise(x_TK, self._ue8m0) if self._quantises else x_TK

    def norm(self, name: str, eps: float, plain: bool = False) -> Norm:
        """A norm before linear layers; ``plain`` for one whose BF16 result is wanted too."""
        return Norm(self.source.plain(name), eps, self._quantises, plain, self._ue8m0)

    def plain_norm(self, name: str) -> Norm:
        """A norm whose result is wanted in BF16 only."""
        return Norm(self.source.plain(name), self.spec.rms_norm_eps, codes=False, plain=True)

    def linear(self, *parts: Part) -> Linear:
        """One layer of matrices with the same input, each padded below to whole blocks."""
        if self._fp8:
            return Fp8Linear(below([self._fp8_matrix(part) for part in parts]), self._ue8m0)
        return Bf16Linear(torch.cat([self._bf16_matrix(part) for part in parts]))

    def projections(self, prefix: str) -> Projections:
        spec = self.spec
        kv_a = Part(f"{prefix}.kv_a_proj_with_mqa.weight", self._pairs(spec.latent_dim))
        queries = self._pairs(spec.qk_head_dim)
        kv_b = self.source.plain(f"{prefix}.kv_b_proj.weight")
        common = (
            self.source.plain(f"{prefix}.kv_a_layernorm.weight"),
            kv_b.view(self._heads, -1, spec.kv_lora_rank),
            self.linear(Part(f"{prefix}.o_proj.weight")),
        )
        if spec.q_lora_rank is None:
            qkv_a = self.linear(Part(f"{prefix}.q_proj.weight", queries), kv_a)
            return Projections(qkv_a, whole_blocks(self._heads * spec.qk_head_dim), None, None, *common)
        qkv_a = self.linear(Part(f"{prefix}.q_a_proj.weight"), kv_a)
        q_norm = self.norm(f"{prefix}.q_a_layernorm.weight", spec.latent_norm_eps)
        q_b = self.linear(Part(f"{prefix}.q_b_proj.weight", queries))
        return Projections(qkv_a, whole_blocks(spec.q_lora_rank), q_norm, q_b, *common)

    def swiglu(self, prefix: str) -> tuple[Linear, Linear]:
        """[gate; up] and down of a dense layer."""
        gate_up = self.linear(Part(f"{prefix}.gate_proj.weight"), Part(f"{prefix}.up_proj.weight"))
        width = whole_blocks(self._dense_width)
        return gate_up, self.linear(Part(f"{prefix}.down_proj.weight", columns=width))

    def experts(self, prefix: str) -> Fp8Experts | Bf16Experts:
        """This rank's routed experts, then its part of the shared ones, in pieces as wide as a routed one."""
        if self._fp8:
            return Fp8Experts(self._fp8_stack(prefix), self._ue8m0, self.has_foreign)
        gate_up, down = self._stacks(torch.bfloat16)
        for expert in range(len(down)):
            for place, matrix in zip(_places(gate_up, down, expert), self._expert(prefix, expert), strict=True):
                place.copy_(pad(matrix, *place.shape))
        return Bf16Experts(gate_up, down, self.has_foreign)

    def _fp8_stack(self, prefix: str) -> Stack:
        gate_up, down = self._stacks(chip_of(self.source.device).fp8)
        stack = Stack(gate_up, self._scales(gate_up), down, self._scales(down))
        for expert in range(len(down)):
            codes = _places(gate_up, down, expert)
            scales = _places(stack.gate_up_scales, stack.down_scales, expert)
            for place, scale_place, matrix in zip(codes, scales, self._fp8_expert(prefix, expert), strict=True):
                padded = pad_fp8(matrix, *place.shape)
                place.copy_(padded.codes)
                scale_place.copy_(padded.scales)
        return stack

    def _stacks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Room for gate and up, and for down, of all experts."""
        spec, device = self.spec, self.source.device
        count, width = len(self.experts_held) + self.shared_pieces, whole_blocks(self._expert_width)
        gate_up = torch.empty(count, 2 * width, spec.hidden_size, dtype=dtype, device=device)
        return gate_up, torch.empty(count, spec.hidden_size, width, dtype=dtype, device=device)

    def _scales(self, stack: Tensor) -> Tensor:
        """Room for the scales of a stack."""
        return torch.empty(len(stack), *block_grid(stack.shape[1:]), device=stack.device)

    def _expert(self, prefix: str, expert: int) -> list[Tensor]:
        """gate, up and down of an expert of the stack, or of a piece of the shared ones, in BF16."""
        if expert < len(self.experts_held):
            return [self.source.plain(name) for name in _names(f"{prefix}.experts.{self.experts_held[expert]}")]
        width, number = self._expert_width, expert - len(self.experts_held)
        piece = slice(number * width, (number + 1) * width)
        gate, up, down = (self.source.plain(name) for name in _names(f"{prefix}.shared_experts"))
        return [gate[piece], up[piece], down[:, piece]]

    def _fp8_expert(self, prefix: str, expert: int) -> list[Fp8Matrix]:
        """The same in FP8: as stored, unless a piece of the shared experts cuts a scale block."""
        if expert < len(self.experts_held):
            return [self.source.fp8(name) for name in _names(f"{prefix}.experts.{self.experts_held[expert]}")]
        if self.shared_pieces == 1:
            return [self.source.fp8(name) for name in _names(f"{prefix}.shared_experts")]
        return [quantise_blocks(matrix) for matrix in self._expert(prefix, expert)]

    def _pairs(self, block: int) -> Reorder | None:
        """For the rows of a projection whose last ones in each ``block`` are rotated."""
        if self.spec.rope_interleave:
            return None
        return lambda weight_NK: adjacent_pairs(self.spec, weight_NK, block)

    def _fp8_matrix(self, part: Part) -> Fp8Matrix:
        matrix = self.source.fp8(part.name)
        if part.reorder is not None:  # rows leave their scale blocks
            matrix = quantise_blocks(part.reorder(dequantise_blocks(matrix, torch.float32)))
        rows, columns = matrix.codes.shape
        return pad_fp8(matrix, whole_blocks(rows), part.columns or columns)

    def _bf16_matrix(self, part: Part) -> Tensor:
        weight_NK = self.source.plain(part.name)
        if part.reorder is not None:
            weight_NK = part.reorder(weight_NK)
        rows, columns = weight_NK.shape
        return pad(weight_NK, whole_blocks(rows), part.columns or columns)


def held_experts(spec: ModelSpec, mesh: Mesh) -> range:
    """The routed experts of which this rank holds all, or a slice of the width."""
    each = spec.n_routed_experts // mesh.grid.ep
    first = mesh.position.expert_group * each
    return range(first, first + each)


def _names(prefix: str) -> list[str]:
    return [f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")]


def _places(gate_up: Tensor, down: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where an expert's gate, up and down go in the stacks of codes, or of scales."""
    gate, up = gate_up[expert].chunk(2)
    return gate, up, down[expert]
