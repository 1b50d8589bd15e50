"""Activations to FP8 with one scale per 128 channels; residual add and RMSNorm in the same pass, for INT8 too.

Shape letters: T tokens, P partial results to be added, K channels, G groups of 128 channels.
Sources: DeepSeek-V3 (arXiv 2412.19437), section 3.3; `models.quantise.quantise_activation_fp8` is the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import e4m3, pdl, tiles
from .chips import Chip, check, chip_of, options
from .sizes import cdiv, power_of_2

GROUP = 128
E4M3_MAX = 448.0
_CARRIERS = {"fp8": torch.uint8, "int8": torch.int8}
MANY = 1 << 23  # numbers: from there on programs cost their start, before that a row's latency
FLOOR = 1e-4  # the least absmax of a group: zeros must not give 0 / 0


class Codes(NamedTuple):
    """Quantised activations: ``codes`` FP8 [T, K] and ``scales`` float32 [T, G], stored one group after another.

    Or INT8 codes, with a scale a row, [T, 1].
    """

    codes: torch.Tensor
    scales: torch.Tensor


class Normed(NamedTuple):
    residual: torch.Tensor | None  # [T, K], the sum that was normed; None when nothing was added
    plain: torch.Tensor | None  # [T, K] BF16
    quantised: Codes | None


def empty_codes(tokens: int, channels: int, device: torch.device, form: str = "fp8") -> Codes:
    """Room for quantised activations. Scales lie group by group: that is what matrix kernels read in one piece."""
    if form == "int8":
        scales = torch.empty(tokens, 1, dtype=torch.float32, device=device)
        return Codes(torch.empty(tokens, channels, dtype=torch.int8, device=device), scales)
    scales_GT = torch.empty(cdiv(channels, GROUP), tokens, dtype=torch.float32, device=device)
    return Codes(torch.empty(tokens, channels, dtype=chip_of(device).fp8, device=device), scales_GT.t())


@triton.jit
def quantise_groups(x_GX, UE8M0: tl.constexpr, FNUZ: tl.constexpr, INSTRUCTION: tl.constexpr):
    """Codes [G, 128] and scales [G] of FP32 values."""
    amax_G = tl.maximum(tl.max(tl.abs(x_GX), 1), 1e-4)
    scale_G = tl.div_rn(amax_G, 448.0)
    if UE8M0:
        bits_G = scale_G.to(tl.uint32, bitcast=True) + 0x7FFFFF
        scale_G = (bits_G & 0x7F800000).to(tl.float32, bitcast=True)
    codes_GX = e4m3.encode(quotient(x_GX, scale_G, INSTRUCTION), FNUZ, INSTRUCTION)
    return codes_GX, scale_G * 2.0 if FNUZ else scale_G


@triton.jit
def quotient(x_GX, scale_G, INSTRUCTION: tl.constexpr):
    """x / scale, correctly rounded; cheaper than a division where the chip has fast fused multiply-adds."""
    scale_GX = tl.broadcast_to(scale_G[:, None], x_GX.shape)
    if INSTRUCTION:  # Markstein, 1990
        inverse_GX = tl.broadcast_to(tl.div_rn(1.0, scale_G)[:, None], x_GX.shape)
        near_GX = x_GX * inverse_GX
        nearer_GX = tl.fma(tl.fma(-near_GX, scale_GX, x_GX), inverse_GX, near_GX)
        quotient_GX = tl.fma(tl.fma(-nearer_GX, scale_GX, x_GX), inverse_GX, nearer_GX)
    else:
        quotient_GX = tl.div_rn(x_GX, scale_GX)
    return quotient_GX


@triton.jit
def int8_codes(x_GX, scale_G, INSTRUCTION: tl.constexpr):
    """To nearest even: sums with 1.5 x 2^23 are whole numbers."""
    quotient_GX = tl.minimum(tl.maximum(quotient(x_GX, scale_G, INSTRUCTION), -127.0), 127.0)
    return ((quotient_GX + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _added(branch_ptr, branch_stride_p, residual_ptr, k_GX, K, P: tl.constexpr, ADD: tl.constexpr):
    """The row's sum at channels ``k_GX``, rounded to BF16 if anything was added."""
    mask = k_GX < K
    x_GX = tl.load(branch_ptr + k_GX, mask=mask, other=0.0).to(tl.float32)
    for p in tl.static_range(1, P):
        x_GX += tl.load(branch_ptr + p * branch_stride_p + k_GX, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x_GX += tl.load(residual_ptr + k_GX, mask=mask, other=0.0).to(tl.float32)
    if ADD or P > 1:
        x_GX = x_GX.to(tl.bfloat16).to(tl.float32)
    return x_GX


@triton.jit(do_not_specialize=["scales_stride"])
def _add_norm_quantise(
    branch_ptr, branch_stride_t, branch_stride_p, residual_ptr, residual_stride, weight_ptr, sum_ptr, plain_ptr,
    codes_ptr, scales_ptr, scales_stride, eps, K, P: tl.constexpr, ADD: tl.constexpr, PLAIN: tl.constexpr,
    FORM: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr, INSTRUCTION: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, parts of a row. Each program sums the squares of the whole row: the costly rest is shared out."""
    t = tl.program_id(0).to(tl.int64)
    x_X = tl.arange(0, 128)
    all_GX = tl.arange(0, BLOCK // 128)[:, None] * 128 + x_X[None, :]
    group_G = tl.program_id(1) * (PART // 128) + tl.arange(0, PART // 128)
    k_GX = group_G[:, None] * 128 + x_X[None, :]
    weight_GX = tl.load(weight_ptr + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
    branch_ptr += t * branch_stride_t
    if ADD:
        residual_ptr += t * residual_stride
    pdl.wait(PDL)
    pdl.release(PDL)
    row_GX = _added(branch_ptr, branch_stride_p, residual_ptr, all_GX, K, P, ADD)
    mean_square = tl.sum(tl.sum(row_GX * row_GX, 1), 0) / K
    part_GX = row_GX if PART == BLOCK else _added(branch_ptr, branch_stride_p, residual_ptr, k_GX, K, P, ADD)
    if ADD or P > 1:
        tl.store(sum_ptr + t * K + k_GX, part_GX, mask=k_GX < K)
    normed_GX = (part_GX * tl.rsqrt(mean_square + eps) * weight_GX).to(tl.bfloat16)
    if PLAIN:
        tl.store(plain_ptr + t * K + k_GX, normed_GX, mask=k_GX < K)
    if FORM == "int8":
        all_weight_GX = tl.load(weight_ptr + all_GX, mask=all_GX < K, other=0.0).to(tl.float32)
        amax_GX = tl.abs(row_GX * tl.rsqrt(mean_square + eps) * all_weight_GX).to(tl.bfloat16).to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.max(amax_GX, 1), 0), 1e-10), 127.0)
        scale_G = tl.broadcast_to(scale, group_G.shape)
        tl.store(codes_ptr + t * K + k_GX, int8_codes(normed_GX.to(tl.float32), scale_G, INSTRUCTION), mask=k_GX < K)
        tl.store(scales_ptr + t, scale, mask=tl.program_id(1) == 0)
    elif FORM == "fp8":
        codes_GX, scale_G = quantise_groups(normed_GX.to(tl.float32), UE8M0, FNUZ, INSTRUCTION)
        tl.store(codes_ptr + t * K + k_GX, codes_GX, mask=k_GX < K)
        tl.store(scales_ptr + t + group_G * scales_stride, scale_G, mask=group_G * 128 < K)


def add_norm_quantise(
    branch_TPK: torch.Tensor,
    residual_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    plain: bool = False,
    quantise: str | None = "fp8",
    ue8m0: bool = False,
) -> Normed:
    """residual + sum over P of branch, rounded to BF16; its RMSNorm; and that norm's codes. One launch.

    ``branch_TPK``: [T, K] or, as partial results, [T, P, K]; BF16 or FP32, channels contiguous. ``residual_TK`` BF16.
    ``quantise``: "fp8" for 1 x 128 codes, "int8" for codes with a scale a row, or None.
    """
    name = "add_norm_quantise"
    tokens, channels = branch_TPK.shape[0], branch_TPK.shape[-1]
    parts = branch_TPK.shape[1] if branch_TPK.dim() == 3 else 1
    check(branch_TPK.dim() in (2, 3) and branch_TPK.stride(-1) == 1, "channels must be contiguous", name)
    check(weight_K.shape == (channels,) and weight_K.is_contiguous(), f"weight {tuple(weight_K.shape)}", name)
    if residual_TK is not None:
        fits = residual_TK.shape == (tokens, channels) and residual_TK.stride(-1) == 1
        check(fits and residual_TK.dtype == torch.bfloat16, f"residual {tuple(residual_TK.shape)}", name)
    device = branch_TPK.device
    chip = chip_of(device)
    check(quantise != "fp8" or chip.fp8_units, f"{chip.name} has no FP8 units, so activations stay BF16", name)

    def bf16() -> torch.Tensor:
        return torch.empty(tokens, channels, dtype=torch.bfloat16, device=device)

    adds = residual_TK is not None or parts > 1
    out = Normed(
        bf16() if adds else None,
        bf16() if plain else None,
        empty_codes(tokens, channels, device, quantise) if quantise else None,
    )
    block = max(GROUP, power_of_2(channels))
    part = norm_part(tokens, channels, parts, chip)
    _add_norm_quantise[(tokens, cdiv(channels, part))](
        branch_TPK, branch_TPK.stride(0), branch_TPK.stride(1) if branch_TPK.dim() == 3 else 0,
        residual_TK, residual_TK.stride(0) if residual_TK is not None else 0, weight_K, out.residual, out.plain,
        out.quantised.codes.view(_CARRIERS[quantise]) if quantise and out.quantised else None,
        out.quantised.scales if out.quantised else None, tokens, eps, channels,
        P=parts, ADD=residual_TK is not None, PLAIN=plain, FORM=quantise, UE8M0=ue8m0, FNUZ=chip.fnuz,
        INSTRUCTION=chip.encodes_fp8, BLOCK=block, PART=part, PDL=chip.dependent_launch,
        **options(chip, warps=4 if block <= 2048 else 8),
    )  # fmt: skip
    return out


def norm_part(tokens: int, channels: int, parts: int, chip: Chip) -> int:
    """Channels of a row that a program quantises: few tokens leave processors free to share a row.

    Each of them reads all of it, so with several partial results they must not outnumber the processors.
    """
    rooms = chip.processors * (4 if parts <= 2 else 1)
    part = max(GROUP, power_of_2(channels))
    while part > 1024 and tokens * cdiv(channels, part // 2) <= rooms:
        part //= 2
    return part


def add_norm_quantise_eager(
    branch_TPK: torch.Tensor,
    residual_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    plain: bool = False,
    quantise: str | None = "fp8",
    ue8m0: bool = False,
) -> Normed:
    """The twin of `add_norm_quantise`."""
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


@triton.jit(do_not_specialize=["scales_stride"])
def _quantise(
    x_ptr, x_stride, codes_ptr, scales_ptr, scales_stride, K, GATED: tl.constexpr,
    UE8M0: tl.constexpr, FNUZ: tl.constexpr, INSTRUCTION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    k_GX = group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    pdl.wait(PDL)
    pdl.release(PDL)
    x_GX = tl.load(x_ptr + t * x_stride + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
    if GATED:
        up_GX = tl.load(x_ptr + t * x_stride + K + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
        x_GX = tiles.silu_product(x_GX, up_GX).to(tl.bfloat16).to(tl.float32)
    codes_GX, scale_G = quantise_groups(x_GX, UE8M0, FNUZ, INSTRUCTION)
    tl.store(codes_ptr + t * K + k_GX, codes_GX, mask=k_GX < K)
    tl.store(scales_ptr + t + group_G * scales_stride, scale_G, mask=group_G * 128 < K)


def quantise(x_TK: torch.Tensor, ue8m0: bool = False, gated: bool = False) -> Codes:
    """1 x 128 codes of BF16 or FP32 activations [T, K]; channels contiguous.

    ``gated``: of silu(gate) * up in BF16, where ``x_TK`` is [gate | up].
    """
    check(x_TK.dim() == 2 and x_TK.stride(1) == 1, "activations must be [T, K] with contiguous channels", "quantise")
    chip = chip_of(x_TK.device)
    check(chip.fp8_units, f"{chip.name} has no FP8 units, so activations stay BF16", "quantise")
    tokens, channels = x_TK.shape
    channels = channels // 2 if gated else channels
    out = empty_codes(tokens, channels, x_TK.device)
    block = 1024 if tokens * channels < MANY else 2048
    _quantise[(tokens, cdiv(channels, block))](
        x_TK, x_TK.stride(0), out.codes.view(torch.uint8), out.scales, tokens, channels, GATED=gated,
        UE8M0=ue8m0, FNUZ=chip.fnuz, INSTRUCTION=chip.encodes_fp8, BLOCK=block, PDL=chip.dependent_launch,
        **options(chip, warps=4),
    )  # fmt: skip
    return out


def quantise_eager(x_TK: torch.Tensor, ue8m0: bool = False, gated: bool = False) -> Codes:
    """The twin of `quantise`."""
    x_TK = _joined(x_TK) if gated else x_TK
    tokens, channels = x_TK.shape
    groups = cdiv(channels, GROUP)
    x_TGX = torch.nn.functional.pad(x_TK.float(), (0, groups * GROUP - channels)).view(tokens, groups, GROUP)
    scales_TG = divided(x_TGX.abs().amax(2).clamp(min=FLOOR), E4M3_MAX)
    if ue8m0:
        mantissa, exponent = torch.frexp(scales_TG)
        scales_TG = torch.ldexp(torch.ones_like(scales_TG), exponent - (mantissa == 0.5).int())
    fp8 = chip_of(x_TK.device).fp8
    half = 2.0 if fp8 == torch.float8_e4m3fnuz else 1.0  # an fnuz code stands for half the e4m3fn value
    quotient_TGX = (x_TGX / scales_TG[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = (quotient_TGX / half).to(fp8).view(tokens, -1)[:, :channels]
    return Codes(codes.contiguous(), scales_TG * half)


def quantise_rows_eager(x_TK: torch.Tensor, gated: bool = False) -> Codes:
    """The twin of `int8.quantise_rows`."""
    x_TK = _joined(x_TK) if gated else x_TK.float()
    scales_T1 = divided(x_TK.abs().amax(1, keepdim=True).clamp(min=1e-10), 127)
    return Codes((x_TK / scales_T1).round().clamp(-127, 127).to(torch.int8), scales_T1)


def divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """Correctly rounded quotients: on a GPU torch multiplies by the reciprocal of a number that is no tensor there."""
    return x / torch.full_like(x, by)


def _joined(x_TK: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate | up], rounded to BF16."""
    gate_TK, up_TK = x_TK.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate_TK) * up_TK).bfloat16().float()


def dequantise(x: Codes) -> torch.Tensor:
    """The float32 activations that codes stand for, [T, K]."""
    if x.codes.dtype == torch.int8:
        return x.codes.float() * x.scales
    scales_TK = x.scales.repeat_interleave(GROUP, 1)[:, : x.codes.shape[1]]
    return x.codes.float() * scales_TK
