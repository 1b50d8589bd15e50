"""What few tokens attended to, from the space of latents to o_proj: one launch where three would do the same.

The parts of the context are merged, multiplied by the values' half of kv_b, which is read before waiting for what is
ahead, and quantised for the next product. Of many tokens a library's products are faster.

Shape letters: T tokens, H heads, P parts of the context, C latent (kv_lora_rank), V value dim, J columns of a
piece of C, Y rows of kv_b of a head.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import kv_b, pdl
from .chips import check, chip_of, options
from .kv_b import FEW_TOKENS, KvB, check_kv_b, columns_of_piece
from .mla_decode import Attended, merged_row
from .quant import GROUP, Codes, empty_codes, quantise_eager, quantise_groups
from .sizes import cdiv, power_of_2

_BLOCK_T = 16  # the narrow side of the matrix units


@triton.jit
def _context(
    part_ptr, lse_ptr, h, first, T, H, j_J, C: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Columns of what a head's tokens from ``first`` on attended to, BF16 [T, J]."""
    t_T = tl.arange(0, BLOCK_T)
    context_TJ = tl.zeros((BLOCK_T, j_J.shape[0]), tl.bfloat16)
    for t in tl.static_range(TOKENS):
        row = (tl.minimum(first + t, T - 1) * H + h).to(tl.int64)
        context_J = merged_row(part_ptr, lse_ptr, row, j_J, C, PARTS, PADDED).to(tl.bfloat16)
        context_TJ = tl.where((t_T == t)[:, None], context_J[None, :], context_TJ)
    return context_TJ


@triton.jit(do_not_specialize=["T"])
def _values(
    part_ptr, lse_ptr, kv_b_ptr, kv_b_stride, scales_ptr, scales_stride, out_ptr, out_scales_ptr, out_scales_stride,
    T, H, Y, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr, BLOCK_J: tl.constexpr,
    IN_BLOCK: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
    INSTRUCTION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: heads, groups of tokens. C in pieces of J columns, the first of which is read before waiting."""
    h = tl.program_id(0)
    first_t = tl.program_id(1) * TOKENS
    first = h * Y + (Y - V)
    j_J = tl.arange(0, BLOCK_J)
    w_VJ = kv_b.head_rows(kv_b_ptr, kv_b_stride, scales_ptr, scales_stride, first, BLOCK_V, V, 0, BLOCK_J, C, IN_BLOCK)
    pdl.wait(PDL)
    pdl.release(PDL)
    context_TJ = _context(part_ptr, lse_ptr, h, first_t, T, H, j_J, C, PARTS, PADDED, TOKENS, BLOCK_T)
    out_VT = tl.dot(w_VJ, tl.trans(context_TJ))
    for piece in tl.static_range(1, PIECES):
        j = piece * BLOCK_J
        w_VJ = kv_b.head_rows(
            kv_b_ptr, kv_b_stride, scales_ptr, scales_stride, first, BLOCK_V, V, j, BLOCK_J, C, IN_BLOCK
        )
        context_TJ = _context(part_ptr, lse_ptr, h, first_t, T, H, j + j_J, C, PARTS, PADDED, TOKENS, BLOCK_T)
        out_VT = tl.dot(w_VJ, tl.trans(context_TJ), out_VT)
    out_TV = tl.trans(out_VT).to(tl.bfloat16)
    v_V = tl.arange(0, BLOCK_V)
    t_T = first_t + tl.arange(0, BLOCK_T)
    valid_T = (t_T < T) & (t_T < first_t + TOKENS)
    place_TV = (t_T * H * V + h * V)[:, None] + v_V[None, :]
    mask_TV = valid_T[:, None] & (v_V < V)[None, :]
    if QUANTISE:
        codes_TV, scale_T = quantise_groups(out_TV.to(tl.float32), UE8M0, FNUZ, INSTRUCTION)
        tl.store(out_ptr + place_TV, codes_TV, mask=mask_TV)
        tl.store(out_scales_ptr + t_T + h * out_scales_stride, scale_T, mask=valid_T)
    else:
        tl.store(out_ptr + place_TV, out_TV, mask=mask_TV)


def values(
    attended: Attended, weights: KvB, value: int, quantise: bool = False, ue8m0: bool = False
) -> Codes | torch.Tensor:
    """[T, H V] for up to `kv_b.FEW_TOKENS` tokens: BF16, or, if ``value`` is 128, codes as of `quant.quantise`."""
    name = "values"
    part, lse_THP = attended
    tokens, heads, latent = part.shape[0], part.shape[1], part.shape[-1]
    parts = 1 if lse_THP is None else lse_THP.shape[2]
    check(tokens <= FEW_TOKENS, f"{tokens} tokens", name)
    check_kv_b(weights, heads, latent, name)
    device = part.device
    chip = chip_of(device)
    check(not quantise or (value == GROUP and chip.fp8_units), f"codes of values of {value}", name)
    out: Codes | torch.Tensor
    pointers: tuple[torch.Tensor | int | None, ...]
    if quantise:
        out = empty_codes(tokens, heads * value, device)
        pointers = out.codes.view(torch.uint8), out.scales, out.scales.stride(1)
    else:
        out = torch.empty(tokens, heads * value, dtype=torch.bfloat16, device=device)
        pointers = out, None, 0
    block_j = columns_of_piece(latent, chip)
    whole = weights.in_block(weights.rows - value, value, block_j)
    together = power_of_2(cdiv(tokens, max(1, chip.processors // heads)))
    _values[(heads, cdiv(tokens, together))](
        part, lse_THP, *weights.arguments(chip), *pointers, tokens, heads, weights.rows, value, latent, PARTS=parts,
        PADDED=power_of_2(parts), TOKENS=together, BLOCK_T=_BLOCK_T, BLOCK_V=max(16, power_of_2(value)),
        PIECES=cdiv(latent, block_j), BLOCK_J=block_j, IN_BLOCK=whole, QUANTISE=quantise, UE8M0=ue8m0, FNUZ=chip.fnuz,
        INSTRUCTION=chip.encodes_fp8, PDL=chip.dependent_launch, **options(chip, 8),
    )  # fmt: skip
    return out


def values_eager(
    attended: Attended, weights: KvB, value: int, quantise: bool = False, ue8m0: bool = False
) -> Codes | torch.Tensor:
    """The twin of `values`."""
    part, lse_THP = attended
    context_THC = part
    if lse_THP is not None:
        most_TH1 = lse_THP.amax(2, keepdim=True)
        share_THP = torch.exp2(lse_THP - most_TH1.where(most_TH1 > float("-inf"), 0.0))
        total_TH1 = share_THP.sum(2, keepdim=True)
        share_THP = share_THP / total_TH1.where(total_TH1 > 0, 1.0)
        context_THC = (part.where(share_THP[..., None] > 0, 0.0) * share_THP[..., None]).sum(2)
    v_b_HVC = weights.plain()[:, -value:].float()
    out_TY = torch.einsum("thc,hvc->thv", context_THC.bfloat16().float(), v_b_HVC).bfloat16().flatten(1)
    return quantise_eager(out_TY, ue8m0) if quantise else out_TY
