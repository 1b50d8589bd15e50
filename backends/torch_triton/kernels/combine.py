"""A branch in parts as one matrix in BF16, which ranks then add: one launch, which overlaps with those around it.

Shape letters: T tokens, P parts, D hidden, E experts, R = T P rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl, tiles
from .chips import check, chip_of, options
from .sizes import cdiv

BLOCK_D = 1024


@triton.jit
def _add_parts(
    branch_ptr, stride_t, stride_p, place_ptr, weights_ptr, ids_ptr, beside_ptr, beside_stride, out_ptr, D, E,
    P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, tiles of D. Sums in FP32, in the order of the parts; of experts before E, where there are ids.

    What is beside them comes last. With places a part is the row there. ``stride_t``: then of rows.
    """
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    pdl.wait(PDL)
    pdl.release(PDL)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.static_range(P):
        pair = t * P + p
        mask_D = d_D < D
        if ids_ptr is not None:
            mask_D &= tiles.is_own(tl.load(ids_ptr + pair), E)
        row = t if place_ptr is None else tl.load(place_ptr + pair).to(tl.int64)
        part_D = tl.load(branch_ptr + row * stride_t + p * stride_p + d_D, mask=mask_D, other=0.0).to(tl.float32)
        sum_D += part_D if weights_ptr is None else part_D * tl.load(weights_ptr + pair)
    if beside_ptr is not None:
        sum_D += tl.load(beside_ptr + t * beside_stride + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d_D, sum_D, mask=d_D < D)


def add_parts(
    branch_TPD: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
    beside_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """BF16 [T, D] of BF16 or FP32 parts, and of what is ``beside`` them, rounded once.

    With ``ids_TP``, int32, parts of choices that are none of the first ``experts`` are not read and add nothing.
    """
    tokens, parts, hidden = branch_TPD.shape
    check(branch_TPD.stride(2) == 1, "channels must be contiguous", "add_parts")
    out_TD = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=branch_TPD.device)
    strides = branch_TPD.stride()[:2]
    return _launch("add_parts", branch_TPD, strides, parts, (None, None), ids_TP, experts, beside_TD, out_TD)


def add_sorted(
    y_RD: torch.Tensor,
    place_R: torch.Tensor,
    weights_TP: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
    beside_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """FP32 [T, D]: each token's BF16 rows ``y_RD``, which lie at ``place_R``, times their weights.

    ``ids_TP``, ``experts``, ``beside_TD``: as in `add_parts`.
    """
    (tokens, choices), (rows, hidden) = weights_TP.shape, y_RD.shape
    fits = rows == place_R.numel() == tokens * choices and y_RD.is_contiguous() and weights_TP.is_contiguous()
    fits = fits and weights_TP.dtype == torch.float32
    check(fits, f"{rows} rows for weights {tuple(weights_TP.shape)} in {weights_TP.dtype}", "add_sorted")
    out_TD = torch.empty(tokens, hidden, dtype=torch.float32, device=y_RD.device)
    sorted_ = place_R, weights_TP
    return _launch("add_sorted", y_RD, (hidden, 0), choices, sorted_, ids_TP, experts, beside_TD, out_TD)


def _launch(
    name: str, parts: torch.Tensor, strides: tuple[int, ...], count: int, sorted_: tuple[torch.Tensor | None, ...],
    ids_TP: torch.Tensor | None, experts: int, beside_TD: torch.Tensor | None, out_TD: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``sorted_``: places and weights of rows that are sorted."""
    tokens, hidden = out_TD.shape
    if ids_TP is not None:
        fits = ids_TP.shape == (tokens, count) and ids_TP.dtype == torch.int32 and ids_TP.is_contiguous()
        check(fits, f"choices {tuple(ids_TP.shape)} in {ids_TP.dtype}", name)
    if beside_TD is not None:
        fits = beside_TD.shape == (tokens, hidden) and beside_TD.stride(1) == 1
        check(fits, f"{tuple(beside_TD.shape)} beside", name)
    beside = (None, 0) if beside_TD is None else (beside_TD, beside_TD.stride(0))
    chip = chip_of(parts.device)
    _add_parts[(tokens, cdiv(hidden, BLOCK_D))](
        parts, *strides, *sorted_, ids_TP, *beside, out_TD, hidden, experts, P=count, BLOCK_D=BLOCK_D,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out_TD


def add_sorted_eager(
    y_RD: torch.Tensor,
    place_R: torch.Tensor,
    weights_TP: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
    beside_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `add_sorted`."""
    y_TPD = y_RD[place_R.long()].float().unflatten(0, weights_TP.shape) * weights_TP[:, :, None]
    sum_TD = _own(y_TPD, ids_TP, experts).sum(1)
    return sum_TD if beside_TD is None else sum_TD + beside_TD


def add_parts_eager(
    branch_TPD: torch.Tensor,
    ids_TP: torch.Tensor | None = None,
    experts: int = 0,
    beside_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `add_parts`."""
    sum_TD = _own(branch_TPD, ids_TP, experts).sum(1, dtype=torch.float32)
    return (sum_TD if beside_TD is None else sum_TD + beside_TD).bfloat16()


def _own(parts_TPD: torch.Tensor, ids_TP: torch.Tensor | None, experts: int) -> torch.Tensor:
    if ids_TP is None:
        return parts_TPD
    return parts_TPD.masked_fill(((ids_TP < 0) | (ids_TP >= experts))[:, :, None], 0)
