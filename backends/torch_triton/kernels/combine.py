"""A branch in parts as one matrix in BF16, which ranks then add: one launch, which overlaps with those around it.

Shape letters: T tokens, P parts, D hidden, E experts, R = T P rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options
from .sizes import cdiv

BLOCK_D = 1024


@triton.jit
def _add_parts(
    branch_ptr, stride_t, stride_p, ids_ptr, out_ptr, D, E, P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: tokens, tiles of D. Sums in FP32, in the order of the parts; of experts before E, where there are ids."""
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    pdl.wait(PDL)
    pdl.release(PDL)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.static_range(P):
        mask_D = d_D < D
        if ids_ptr is not None:
            expert = tl.load(ids_ptr + t * P + p)
            mask_D &= (expert >= 0) & (expert < E)
        sum_D += tl.load(branch_ptr + t * stride_t + p * stride_p + d_D, mask=mask_D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d_D, sum_D, mask=d_D < D)


def add_parts(branch_TPD: torch.Tensor, ids_TP: torch.Tensor | None = None, experts: int = 0) -> torch.Tensor:
    """BF16 [T, D] of BF16 or FP32 parts, rounded once.

    With ``ids_TP``, int32, parts of choices that are none of the first ``experts`` are not read and add nothing.
    """
    tokens, parts, hidden = branch_TPD.shape
    if ids_TP is not None:
        fits = ids_TP.shape == (tokens, parts) and ids_TP.dtype == torch.int32 and ids_TP.is_contiguous()
        check(fits, f"choices {tuple(ids_TP.shape)} in {ids_TP.dtype}", "add_parts")
    check(branch_TPD.stride(2) == 1, "channels must be contiguous", "add_parts")
    chip = chip_of(branch_TPD.device)
    out_TD = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=branch_TPD.device)
    _add_parts[(tokens, cdiv(hidden, BLOCK_D))](
        branch_TPD, *branch_TPD.stride()[:2], ids_TP, out_TD, hidden, experts, P=parts, BLOCK_D=BLOCK_D,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out_TD


@triton.jit
def _add_sorted(
    y_ptr, place_ptr, weights_ptr, ids_ptr, out_ptr, D, E, P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid: tokens, tiles of D. As `_add_parts`, of rows that lie where their pairs were sorted."""
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    pdl.wait(PDL)
    pdl.release(PDL)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.static_range(P):
        mask_D = d_D < D
        if ids_ptr is not None:
            expert = tl.load(ids_ptr + t * P + p)
            mask_D &= (expert >= 0) & (expert < E)
        row = tl.load(place_ptr + t * P + p).to(tl.int64)
        y_D = tl.load(y_ptr + row * D + d_D, mask=mask_D, other=0.0).to(tl.float32)
        sum_D += y_D * tl.load(weights_ptr + t * P + p)
    tl.store(out_ptr + t * D + d_D, sum_D, mask=d_D < D)


def add_sorted(
    y_RD: torch.Tensor,
    place_R: torch.Tensor,
    weights_TP: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
) -> torch.Tensor:
    """FP32 [T, D]: each token's BF16 rows ``y_RD``, which lie at ``place_R``, times their weights.

    ``ids_TP``, ``experts``: as in `add_parts`.
    """
    (tokens, choices), (rows, hidden) = weights_TP.shape, y_RD.shape
    fits = rows == place_R.numel() == tokens * choices and y_RD.is_contiguous() and weights_TP.is_contiguous()
    fits = fits and weights_TP.dtype == torch.float32
    check(fits, f"{rows} rows for weights {tuple(weights_TP.shape)} in {weights_TP.dtype}", "add_sorted")
    chip = chip_of(y_RD.device)
    out_TD = torch.empty(tokens, hidden, dtype=torch.float32, device=y_RD.device)
    _add_sorted[(tokens, cdiv(hidden, BLOCK_D))](
        y_RD, place_R, weights_TP, ids_TP, out_TD, hidden, experts, P=choices, BLOCK_D=BLOCK_D,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out_TD


def add_sorted_eager(
    y_RD: torch.Tensor,
    place_R: torch.Tensor,
    weights_TP: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
) -> torch.Tensor:
    """The twin of `add_sorted`."""
    y_TPD = y_RD[place_R.long()].float().unflatten(0, weights_TP.shape) * weights_TP[:, :, None]
    if ids_TP is not None:
        y_TPD = y_TPD.masked_fill(((ids_TP < 0) | (ids_TP >= experts))[:, :, None], 0)
    return y_TPD.sum(1)


def add_parts_eager(branch_TPD: torch.Tensor, ids_TP: torch.Tensor | None = None, experts: int = 0) -> torch.Tensor:
    """The twin of `add_parts`."""
    if ids_TP is not None:
        branch_TPD = branch_TPD.masked_fill(((ids_TP < 0) | (ids_TP >= experts))[:, :, None], 0)
    return branch_TPD.sum(1, dtype=torch.float32).bfloat16()
