"""Activations to FP8 codes with one scale per 128 channels.

Shape letters: T tokens, K channels, G groups of 128 channels.
Sources: DeepSeek-V3 (arXiv 2412.19437), section 3.3; `models.quantise.quantise_activation_fp8` is the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import e4m3, pdl, tiles
from .chips import check, chip_of, options
from .sizes import cdiv

GROUP = 128
E4M3_MAX = 448.0
MANY = 1 << 23  # numbers: from there on programs cost their start, before that a row's latency
FLOOR = 1e-4  # the least absmax of a group: zeros must not give 0 / 0


class Codes(NamedTuple):
    """Quantised activations: ``codes`` FP8 [T, K] and ``scales`` float32 [T, G], stored one group after another.

    Or INT8 codes, with a scale a row, [T, 1].
    """

    codes: torch.Tensor
    scales: torch.Tensor


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


@triton.jit(do_not_specialize=["scales_stride"])
def _quantise(
    x_ptr, x_stride, rows_ptr, codes_ptr, scales_ptr, scales_stride, K, GATED: tl.constexpr,
    UE8M0: tl.constexpr, FNUZ: tl.constexpr, INSTRUCTION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    k_GX = group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    pdl.wait(PDL)
    pdl.release(PDL)
    if tiles.is_past(t, rows_ptr):
        return
    x_GX = tl.load(x_ptr + t * x_stride + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
    if GATED:
        up_GX = tl.load(x_ptr + t * x_stride + K + k_GX, mask=k_GX < K, other=0.0).to(tl.float32)
        x_GX = tiles.silu_product(x_GX, up_GX).to(tl.bfloat16).to(tl.float32)
    codes_GX, scale_G = quantise_groups(x_GX, UE8M0, FNUZ, INSTRUCTION)
    tl.store(codes_ptr + t * K + k_GX, codes_GX, mask=k_GX < K)
    tl.store(scales_ptr + t + group_G * scales_stride, scale_G, mask=group_G * 128 < K)


def quantise(x_TK: torch.Tensor, ue8m0: bool = False, gated: bool = False, rows_1: torch.Tensor | None = None) -> Codes:
    """1 x 128 codes of BF16 or FP32 activations [T, K]; channels contiguous.

    ``gated``: of silu(gate) * up in BF16, where ``x_TK`` is [gate | up]. ``rows_1``: int32, how many of the rows are to
    be worked on; codes and scales of others are undefined.
    """
    check(x_TK.dim() == 2 and x_TK.stride(1) == 1, "activations must be [T, K] with contiguous channels", "quantise")
    chip = chip_of(x_TK.device)
    check(chip.fp8_units, f"{chip.name} has no FP8 units, so activations stay BF16", "quantise")
    tokens, channels = x_TK.shape
    channels = channels // 2 if gated else channels
    out = empty_codes(tokens, channels, x_TK.device)
    block = 1024 if tokens * channels < MANY else 2048
    _quantise[(tokens, cdiv(channels, block))](
        x_TK, x_TK.stride(0), rows_1, out.codes.view(torch.uint8), out.scales, tokens, channels, GATED=gated,
        UE8M0=ue8m0, FNUZ=chip.fnuz, INSTRUCTION=chip.encodes_fp8, BLOCK=block, PDL=chip.dependent_launch,
        **options(chip, warps=4),
    )  # fmt: skip
    return out


def quantise_eager(
    x_TK: torch.Tensor, ue8m0: bool = False, gated: bool = False, rows_1: torch.Tensor | None = None
) -> Codes:
    """The twin of `quantise`; of all rows."""
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


def quantise_rows_eager(x_TK: torch.Tensor, gated: bool = False, rows_1: torch.Tensor | None = None) -> Codes:
    """The twin of `int8.quantise_rows`; of all rows."""
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
