"""Residual add, RMSNorm and quantisation in one pass; between tensor-parallel ranks, with the sum of their branches.

Shape letters: T tokens, P partial results to be added, K channels, G groups of 128 channels, W pairs of a group.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3; `quant` and `int8` say what codes are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import branches, pdl, peers
from .chips import Chip, check, chip_of, options
from .peers import Peers
from .quant import GROUP, Codes, empty_codes, int8_codes, quantise_eager, quantise_groups, quantise_rows_eager
from .sizes import cdiv, power_of_2

_CARRIERS = {"fp8": torch.uint8, "int8": torch.int8}


class Normed(NamedTuple):
    residual: torch.Tensor | None  # [T, K], the sum that was normed; None when nothing was added
    plain: torch.Tensor | None  # [T, K] BF16
    quantised: Codes | None


@triton.jit(do_not_specialize=["scales_stride", "RANK"])
def _add_norm_quantise(
    branch_ptr, branch_stride_t, branch_stride_p, residual_ptr, residual_stride, weight_ptr, sum_ptr, plain_ptr,
    codes_ptr, scales_ptr, scales_stride, address_ptr, counts_ptr, RANK, eps, K, P: tl.constexpr, RANKS: tl.constexpr,
    ADD: tl.constexpr, PLAIN: tl.constexpr, FORM: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
    INSTRUCTION: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, SHARES: tl.constexpr,
    TOGETHER: tl.constexpr, TWO_STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: parts of rows, those of a row together. Each program sums the squares of the whole row: the costly rest is
    shared out."""
    t = (tl.program_id(0) // SHARES).to(tl.int64)
    share = tl.program_id(0) % SHARES
    x_X = tl.arange(0, 128)
    all_G = tl.arange(0, BLOCK // 128)
    all_GX = all_G[:, None] * 128 + x_X[None, :]
    group_G = share * (PART // 128) + tl.arange(0, PART // 128)
    k_GX = group_G[:, None] * 128 + x_X[None, :]
    weight_GX = tl.load(weight_ptr + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
    branch_ptr += t * branch_stride_t
    if ADD:
        residual_ptr += t * residual_stride
    if RANKS > 1:
        number = peers.launch_number(counts_ptr)
        memories, own = peers.addresses(address_ptr, RANKS), tl.load(address_ptr + RANK)
    pdl.wait(PDL)
    pdl.release(PDL)
    if ADD:
        row_residual_GX = tl.load(residual_ptr + all_GX, mask=all_GX < K, other=0.0)
        if PART != BLOCK:
            part_residual_GX = tl.load(residual_ptr + k_GX, mask=k_GX < K, other=0.0)
    if RANKS > 1:
        row_GX, part_GX = branches.ranks_sum(
            branch_ptr, branch_stride_p, all_G, group_G, t, K, address_ptr, counts_ptr, memories, own, number, P, RANK,
            RANKS, TOGETHER, TWO_STEPS,
        )  # fmt: skip
    else:
        row_GX = branches.parts(branch_ptr, branch_stride_p, all_GX, K, P)
        part_GX = row_GX if PART == BLOCK else branches.parts(branch_ptr, branch_stride_p, k_GX, K, P)
    if ADD:
        row_GX += row_residual_GX.to(tl.float32)
        part_GX = row_GX if PART == BLOCK else part_GX + part_residual_GX.to(tl.float32)
    if ADD or P > 1 or RANKS > 1:
        row_GX = row_GX.to(tl.bfloat16).to(tl.float32)
        part_GX = part_GX.to(tl.bfloat16).to(tl.float32)
        tl.store(sum_ptr + t * K + k_GX, part_GX, mask=k_GX < K)
    mean_square = tl.sum(tl.sum(row_GX * row_GX, 1), 0) / K
    normed_GX = (part_GX * tl.rsqrt(mean_square + eps) * weight_GX).to(tl.bfloat16)
    if PLAIN:
        tl.store(plain_ptr + t * K + k_GX, normed_GX, mask=k_GX < K)
    if FORM == "int8":
        all_weight_GX = tl.load(weight_ptr + all_GX, mask=all_GX < K, other=0.0).to(tl.float32)
        amax_GX = tl.abs(row_GX * tl.rsqrt(mean_square + eps) * all_weight_GX).to(tl.bfloat16).to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.max(amax_GX, 1), 0), 1e-10), 127.0)
        scale_G = tl.broadcast_to(scale, group_G.shape)
        tl.store(codes_ptr + t * K + k_GX, int8_codes(normed_GX.to(tl.float32), scale_G, INSTRUCTION), mask=k_GX < K)
        tl.store(scales_ptr + t, scale, mask=share == 0)
    elif FORM == "fp8":
        codes_GX, scale_G = quantise_groups(normed_GX.to(tl.float32), UE8M0, FNUZ, INSTRUCTION)
        tl.store(codes_ptr + t * K + k_GX, codes_GX, mask=k_GX < K)
        tl.store(scales_ptr + t + group_G * scales_stride, scale_G, mask=group_G * 128 < K)


def takes(branch_TPK: torch.Tensor, ranks: Peers) -> bool:
    """Whether ranks may add such branches on the way to a norm."""
    tokens, channels = branch_TPK.shape[0], branch_TPK.shape[-1]
    return channels % 2 == 0 and ranks.takes_in_two_steps(tokens * channels // 2)


def add_norm_quantise(
    branch_TPK: torch.Tensor,
    residual_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    plain: bool = False,
    quantise: str | None = "fp8",
    ue8m0: bool = False,
    ranks: Peers | None = None,
) -> Normed:
    """residual + sum over P of branch, rounded to BF16; its RMSNorm; and that norm's codes. One launch.

    ``branch_TPK``: [T, K] or, as partial results, [T, P, K]; BF16 or FP32, channels contiguous. ``residual_TK`` BF16.
    ``quantise``: "fp8" for 1 x 128 codes, "int8" for codes with a scale a row, or None.
    ``ranks``: whose branches, each rounded to BF16, are added, and their sum rounded; all of them call this, and one
    that never does is waited for.
    """
    name = "add_norm_quantise"
    tokens, channels = branch_TPK.shape[0], branch_TPK.shape[-1]
    parts = branch_TPK.shape[1] if branch_TPK.dim() == 3 else 1
    check(branch_TPK.dim() in (2, 3) and branch_TPK.stride(-1) == 1, "channels must be contiguous", name)
    check(weight_K.shape == (channels,) and weight_K.is_contiguous(), f"weight {tuple(weight_K.shape)}", name)
    if residual_TK is not None:
        fits = residual_TK.shape == (tokens, channels) and residual_TK.stride(-1) == 1
        check(fits and residual_TK.dtype == torch.bfloat16, f"residual {tuple(residual_TK.shape)}", name)
    check(plain or quantise is not None, "neither BF16 nor codes are asked for", name)
    check(ranks is None or takes(branch_TPK, ranks), f"{tokens} rows of {channels} channels between ranks", name)
    device = branch_TPK.device
    chip = chip_of(device)
    check(quantise != "fp8" or chip.fp8_units, f"{chip.name} has no FP8 units, so activations stay BF16", name)

    def bf16() -> torch.Tensor:
        return torch.empty(tokens, channels, dtype=torch.bfloat16, device=device)

    adds = residual_TK is not None or parts > 1 or ranks is not None
    out = Normed(
        bf16() if adds else None,
        bf16() if plain else None,
        empty_codes(tokens, channels, device, quantise) if quantise else None,
    )
    block = max(GROUP, power_of_2(channels))
    part = norm_part(tokens, channels, parts, ranks is not None, chip)
    shares, count = cdiv(channels, part), 1 if ranks is None else len(ranks)
    two_steps = ranks is not None and not ranks.takes(tokens * channels // 2)
    _add_norm_quantise[(tokens * shares,)](
        branch_TPK, branch_TPK.stride(0), branch_TPK.stride(1) if branch_TPK.dim() == 3 else 0,
        residual_TK, residual_TK.stride(0) if residual_TK is not None else 0, weight_K, out.residual, out.plain,
        out.quantised.codes.view(_CARRIERS[quantise]) if quantise and out.quantised else None,
        out.quantised.scales if out.quantised else None, tokens, *peers.arguments(ranks), eps, channels,
        P=parts, RANKS=count, ADD=residual_TK is not None, PLAIN=plain, FORM=quantise, UE8M0=ue8m0, FNUZ=chip.fnuz,
        INSTRUCTION=chip.encodes_fp8, BLOCK=block, PART=part, SHARES=shares, TOGETHER=branches.together(count),
        TWO_STEPS=two_steps, PDL=chip.dependent_launch, **options(chip, warps=norm_warps(block, count)),
    )  # fmt: skip
    return out


def norm_part(tokens: int, channels: int, parts: int, between_ranks: bool, chip: Chip) -> int:
    """Channels of a row that a program quantises: few tokens leave processors free to share a row.

    Each of them reads all of it, so with several partial results they must not outnumber the processors; nor must
    programs that wait for those of other ranks.
    """
    rooms = chip.processors * (1 if parts > 2 or between_ranks else 4)
    part = max(GROUP, power_of_2(channels))
    while part > 1024 and tokens * cdiv(channels, part // 2) <= rooms:
        part //= 2
    return part


def norm_warps(block: int, ranks: int) -> int:
    """Each thread holds the words of all ranks at its channels until the last one has come."""
    return 4 if block <= 2048 else 8 if ranks <= 2 else 16


def add_norm_quantise_eager(
    branch_TPK: torch.Tensor,
    residual_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    plain: bool = False,
    quantise: str | None = "fp8",
    ue8m0: bool = False,
    ranks: Peers | None = None,
) -> Normed:
    """The twin of `add_norm_quantise` on one rank."""
    assert ranks is None, "of one rank"
    x_TPK = branch_TPK.float()
    x_TK = x_TPK.sum(1) if x_TPK.dim() == 3 else x_TPK
    adds = residual_TK is not None or (x_TPK.dim() == 3 and x_TPK.shape[1] > 1)
    if residual_TK is not None:
        x_TK = x_TK + residual_TK.float()
    residual = x_TK.bfloat16() if adds else None
    x_TK = x_TK if residual is None else residual.float()
    normed = (x_TK * torch.rsqrt(x_TK.square().mean(-1, keepdim=True) + eps) * weight_K.float()).bfloat16()
    codes = None
    if quantise:
        codes = quantise_rows_eager(normed) if quantise == "int8" else quantise_eager(normed, ue8m0)
    return Normed(residual, normed if plain else None, codes)
