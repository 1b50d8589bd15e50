"""The operators that an NPU has fused, behind one interface with two implementations.

`fused` calls torch-npu's; `composite` writes each of them out in plain PyTorch, which runs anywhere and defines what
the fused operator has to compute. A model is built with one of the two modules and is otherwise the same.

Shape letters: T tokens, D hidden, H heads of this rank, A tokens in absorbed form, Q tokens of prompts, S positions
that they see, C latent, R rope dim, N nope dim, V value dim, E experts, K experts a token, P rows sorted by expert
(T K), I inputs, F outputs.
"""

from __future__ import annotations

import sys
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ....models.errors import InputError
from ....models.spec import ModelSpec
from .step import Decoding, Prompts


class Cache(NamedTuple):
    """Of one layer, or of several with one axis more: blocks of slots with one key head each."""

    latent: Tensor  # [blocks, block_size, 1, C]
    rope: Tensor  # [blocks, block_size, 1, R]


class Permuted(NamedTuple):
    """Tokens as rows for experts. Of rows of INT8 codes there are scales."""

    rows_PD: Tensor
    places: Tensor  # int32 [T K]: the row that each token's choices have gone to
    counts_E: Tensor  # int64: rows of each expert
    scale_P: Tensor | None = None


class Operators(Protocol):
    """What both modules have."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps) over the last axis; statistics in FP32."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""

    def rotate(self, x_THR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Adjacent pairs turned, in FP32; tables are FP32 and hold each pair's number twice. The dtype of ``x_THR``."""

    def write_cache(self, cache: Cache, latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor) -> None:
        """Entries into the slots of the flattened cache."""

    def attend_cached(
        self, q_AHC: Tensor, q_rope_AHR: Tensor, cache: Cache, decoding: Decoding, scale: float
    ) -> Tensor:
        """[A, H, C]: latents are keys and values at once, of all heads; each token sees those up to its own."""

    def attend(
        self, q_QHN: Tensor, q_rope_QHR: Tensor, k_SHN: Tensor, k_rope_SHR: Tensor, v_SHV: Tensor,
        prompts: Prompts, scale: float,
    ) -> Tensor:  # fmt: skip
        """[Q, H, V]: each token sees the keys of its sequence up to its own."""

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None, spec: ModelSpec) -> tuple[Tensor, Tensor]:
        """Weights, float32 [T, K], and experts, int32 [T, K], in any order: `models.routing`."""

    def permute(self, x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
        """Rows sorted by expert, numbers 0 to ``experts`` - 1."""

    def permute_quantised(self, x_TD: Tensor, ids_TK: Tensor, experts: int) -> Permuted:
        """`permute` of `dynamic_quant`."""

    def grouped_matmul(self, rows_PI: Tensor, weight_EIF: Tensor, counts_E: Tensor) -> Tensor:
        """[P, F]: each expert's rows times its matrix. Rows past the last expert's are of no account."""

    def quant_grouped_matmul(
        self, codes_PI: Tensor, scale_P: Tensor, weight_EIF: Tensor, scale_EF: Tensor, counts_E: Tensor
    ) -> Tensor:
        """`grouped_matmul` of codes, in the dtype of ``scale_EF``."""

    def unpermute(self, rows_PD: Tensor, places: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]: the weighted sum of each token's rows, all in FP32."""

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up of [gate | up] along the last axis."""

    def dynamic_quant(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """INT8 codes and float32 scales [T]: each row's largest value becomes 127."""

    def quant_matmul(
        self, codes_TI: Tensor, scale_T: Tensor, weight_IF: Tensor, scale_F: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Codes times codes, summed exactly, times both scales."""


# What fused attention takes; every released model of the family has these sizes.
_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_BLOCK_SIZES = (16, 128)


def choose_operators(spec: ModelSpec, heads: int, block_size: int, device: torch.device) -> Operators:
    """Fused operators on an NPU, for models whose sizes they take; for small ones plain operators, with a note."""
    from . import composite, fused

    if device.type == "cpu":
        return composite
    others = [f"{name} {getattr(spec, name)}" for name, size in _SIZES.items() if getattr(spec, name) != size]
    if heads not in _HEADS:
        others.append(f"{heads} heads a rank")
    if others:
        print(f"note: plain operators: the fused ones do not take {', '.join(others)}", file=sys.stderr)
        return composite
    if block_size not in _BLOCK_SIZES:
        what = f"an NPU's attention takes no blocks of {block_size} tokens"
        raise InputError(what, "engine.block_size", f"set it to {_BLOCK_SIZES[-1]} or {_BLOCK_SIZES[0]}")
    return fused
