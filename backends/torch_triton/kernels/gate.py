"""silu(gate) * up in BF16, for layers whose activations stay in it, rounded as PyTorch rounds it: after each of both.

Shape letters: T tokens, K channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layers import gated
from . import pdl, tiles
from .chips import check, chip_of, options
from .sizes import cdiv

_BLOCK = 1024


@triton.jit
def _gate(x_ptr, x_stride, rows_ptr, out_ptr, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: tokens, tiles of K."""
    t = tl.program_id(0).to(tl.int64)
    k_K = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.release(PDL)
    if tiles.is_past(t, rows_ptr):
        return
    x_ptr += t * x_stride
    gate_K = tl.load(x_ptr + k_K, mask=k_K < K, other=0.0).to(tl.float32)
    up_K = tl.load(x_ptr + K + k_K, mask=k_K < K, other=0.0).to(tl.float32)
    silu_K = tiles.silu_product(gate_K, 1.0).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + t * K + k_K, (silu_K * up_K).to(tl.bfloat16), mask=k_K < K)


def gate(gate_up: torch.Tensor, rows_1: torch.Tensor | None = None) -> torch.Tensor:
    """BF16 [T, K] of BF16 [gate | up], [T, 2 K]; channels contiguous.

    ``rows_1``: int32, how many of the rows are to be worked on; others are undefined.
    """
    check(gate_up.dim() == 2 and gate_up.stride(1) == 1, "gate and up must be [T, 2 K], channels contiguous", "gate")
    check(gate_up.dtype == torch.bfloat16, f"gate and up in {gate_up.dtype}", "gate")
    chip = chip_of(gate_up.device)
    tokens, channels = len(gate_up), gate_up.shape[1] // 2
    out_TK = torch.empty(tokens, channels, dtype=torch.bfloat16, device=gate_up.device)
    _gate[(tokens, cdiv(channels, _BLOCK))](
        gate_up, gate_up.stride(0), rows_1, out_TK, channels, BLOCK=_BLOCK, PDL=chip.dependent_launch,
        **options(chip, 4),
    )  # fmt: skip
    return out_TK


def gate_eager(gate_up: torch.Tensor, rows_1: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `gate`; of all rows."""
    return gated(gate_up)
