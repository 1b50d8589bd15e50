"""Router logits in FP32, scores and group-limited top-k, in one launch.

Programs share the product by experts and channels; the last program of a token tile to finish adds the partial logits
in their order and chooses. Ties go to the lower index, as in `models.routing.route`, which is the definition.

Shape letters: T tokens, E experts, G groups, X experts of a group, C columns (G x X, each padded to a power of two),
K choices, D hidden, S splits of D.
Source: DeepSeek-V2 section 2.2.3 (softmax), DeepSeek-V3 section 2.1.2 (sigmoid with a selection-only bias).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....models.routing import route
from ....models.spec import ModelSpec
from ..layers import product_f32
from . import pdl, tiles
from .chips import check, chip_of, options
from .sizes import cdiv, power_of_2

BLOCK_T = 8  # tokens of a tile, for which one program chooses
MATRIX_T = 16  # the narrow side of the matrix unit: a tile's tokens and zeros
BLOCK_E = 16
BLOCK_D = 128
SPLITS = 8
LIBRARY_TOKENS = 512  # beyond, a library's product of the logits is faster, and its launch does not count
MASKED = tl.constexpr(-3e38)  # below every score, above what is taken or padding


class Choice(NamedTuple):
    ids: torch.Tensor  # int32 [T, K + shared]: chosen experts, best first, then the shared ones
    weights: torch.Tensor  # float32 [T, K + shared]: 1 for the shared ones


class Scratch(NamedTuple):
    """What the programs of a launch tell each other; launches that follow one another may share it."""

    logits_STE: torch.Tensor  # float32
    arrived: torch.Tensor  # int32, one per token tile; zero between launches


def scratch(tokens: int, experts: int, device: torch.device) -> Scratch:
    """Room for up to ``tokens`` tokens, of which a library's product needs none."""
    tokens = min(tokens, LIBRARY_TOKENS)
    logits_STE = torch.empty(SPLITS, tokens, experts, dtype=torch.float32, device=device)
    return Scratch(logits_STE, torch.zeros(cdiv(tokens, BLOCK_T), dtype=torch.int32, device=device))


@triton.jit
def _best(values_TC):
    """Each row's largest column; ties towards the lower index. One integer holds both: a single maximum finds it."""
    C: tl.constexpr = values_TC.shape[1]
    bits_TC = values_TC.to(tl.int32, bitcast=True)
    ordered_TC = bits_TC ^ ((bits_TC >> 31) & 0x7FFFFFFF)  # as the floats are ordered
    reversed_C = tl.arange(0, C) ^ (C - 1)
    key_TC = (ordered_TC.to(tl.int64) << 32) | reversed_C[None, :]
    return (tl.max(key_TC, 1) & 0xFFFFFFFF).to(tl.int32) ^ (C - 1)


@triton.jit
def _limit_groups(choice_TGX, valid_GX, SIGMOID: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Mask all experts but those of the best groups. V3 scores a group by its two best experts, V2 by its best."""
    G: tl.constexpr = choice_TGX.shape[1]
    X: tl.constexpr = choice_TGX.shape[2]
    inside_TGX = tl.where(valid_GX[None, :, :], choice_TGX, float("-inf"))
    best_TG = tl.max(inside_TGX, 2)
    if SIGMOID:
        first_TG = tl.argmax(inside_TGX, 2, tie_break_left=True)
        others_TGX = tl.where(tl.arange(0, X)[None, None, :] == first_TG[:, :, None], float("-inf"), inside_TGX)
        best_TG += tl.max(others_TGX, 2)
    kept_TG = tl.zeros(best_TG.shape, tl.int1)
    for _ in tl.static_range(TOP_GROUPS):
        group_T = _best(tl.where(kept_TG, float("-inf"), best_TG))
        kept_TG = kept_TG | (tl.arange(0, G)[None, :] == group_T[:, None])
    return tl.where(kept_TG[:, :, None], choice_TGX, MASKED if SIGMOID else 0.0)


@triton.jit
def _scores(logits_TC, valid_C, SIGMOID: tl.constexpr):
    if SIGMOID:
        small_TC = tl.exp(-tl.abs(logits_TC))
        scores_TC = tl.where(logits_TC >= 0, 1.0, small_TC) / (1.0 + small_TC)
    else:
        inside_TC = tl.where(valid_C[None, :], logits_TC, float("-inf"))
        shifted_TC = tl.exp(inside_TC - tl.max(inside_TC, 1)[:, None])
        scores_TC = shifted_TC / tl.sum(shifted_TC, 1)[:, None]
    return scores_TC


@triton.jit
def _choose(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling, row_T, T, splits,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    X: tl.constexpr, X_PADDED: tl.constexpr, G_PADDED: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The choices of tokens ``row_T`` from ``splits`` partial logits [S, T, E], added in their order."""
    C: tl.constexpr = G_PADDED * X_PADDED
    c_C = tl.arange(0, C)
    expert_C = c_C // X_PADDED * X + c_C % X_PADDED
    valid_C = (c_C % X_PADDED < X) & (expert_C < E)
    TOKENS: tl.constexpr = row_T.shape[0]
    mask_TC = (row_T < T)[:, None] & valid_C[None, :]
    logits_TC = tl.zeros((TOKENS, C), tl.float32)
    for split in range(splits):
        ptrs_TC = logits_ptr + (split * T + row_T)[:, None] * E + expert_C[None, :]
        logits_TC += tl.load(ptrs_TC, mask=mask_TC, other=0.0, cache_modifier=".cg")

    scores_TC = _scores(logits_TC, valid_C, SIGMOID)
    choice_TC = scores_TC
    if BIAS:
        choice_TC += tl.load(bias_ptr + expert_C, mask=valid_C, other=0.0)[None, :]
    if LIMIT:
        choice_TGX = tl.reshape(choice_TC, (TOKENS, G_PADDED, X_PADDED))
        valid_GX = tl.reshape(valid_C, (G_PADDED, X_PADDED))
        choice_TC = tl.reshape(_limit_groups(choice_TGX, valid_GX, SIGMOID, TOP_GROUPS), (TOKENS, C))
    choice_TC = tl.where(valid_C[None, :], choice_TC, float("-inf"))

    K_PADDED: tl.constexpr = triton.next_power_of_2(K)
    k_K = tl.arange(0, K_PADDED)
    column_TK = tl.zeros((TOKENS, K_PADDED), tl.int32)
    for k in tl.static_range(K):
        best_T = _best(choice_TC)
        column_TK = tl.where(k_K[None, :] == k, best_T[:, None], column_TK)
        choice_TC = tl.where(c_C[None, :] == best_T[:, None], float("-inf"), choice_TC)
    weight_TK = tl.where(k_K[None, :] < K, tl.gather(scores_TC, column_TK, 1), 0.0)
    if NORMALISE:
        weight_TK = weight_TK / (tl.sum(weight_TK, 1) + 1e-20)[:, None]
    if SCALE:
        weight_TK *= scaling
    out_TK = (row_T * (K + SHARED))[:, None] + k_K[None, :]
    out_mask_TK = (row_T < T)[:, None] & (k_K < K)[None, :]
    tl.store(ids_ptr + out_TK, column_TK // X_PADDED * X + column_TK % X_PADDED, mask=out_mask_TK)
    tl.store(weights_ptr + out_TK, weight_TK, mask=out_mask_TK)
    for j in tl.static_range(SHARED):
        tl.store(ids_ptr + row_T * (K + SHARED) + K + j, tl.full((TOKENS,), E + j, tl.int32), mask=row_T < T)
        tl.store(weights_ptr + row_T * (K + SHARED) + K + j, tl.full((TOKENS,), 1.0, tl.float32), mask=row_T < T)


@triton.jit(do_not_specialize=["T"])
def _route(
    x_ptr, x_stride, w_ptr, w_stride, bias_ptr, logits_ptr, arrived_ptr, ids_ptr, weights_ptr, scaling, T, D, span,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    X: tl.constexpr, X_PADDED: tl.constexpr, G_PADDED: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, MATRIX_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of E, splits of D, tiles of T. TOKENS: rows of a tile that can be valid."""
    tile = tl.program_id(2)
    slot_T = tl.arange(0, MATRIX_T)
    t_T = tile * BLOCK_T + slot_T
    valid_T = (slot_T < BLOCK_T) & (t_T < T)
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_E = tl.minimum(e_E, E - 1)
    pdl.wait(PDL)
    pdl.release(PDL)
    acc_ET = tl.zeros((BLOCK_E, MATRIX_T), tl.float32)
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, D)
    for d in tl.range(start, end, BLOCK_D, num_stages=STAGES):
        d_D = d + tl.arange(0, BLOCK_D)
        x_mask_TD = valid_T[:, None] & (d_D < end)[None, :]
        x_TD = tl.load(x_ptr + (t_T * x_stride)[:, None] + d_D[None, :], mask=x_mask_TD, other=0.0)
        w_mask_ED = tl.broadcast_to((d_D < end)[None, :], (BLOCK_E, BLOCK_D))
        w_ED = tl.load(w_ptr + (row_E * w_stride)[:, None] + d_D[None, :], mask=w_mask_ED, other=0.0)
        acc_ET += tl.dot(w_ED, tl.trans(x_TD.to(w_ED.dtype)), input_precision="ieee")
    split_ptr = logits_ptr + tl.program_id(1) * T * E
    tl.store(split_ptr + t_T[None, :] * E + e_E[:, None], acc_ET, mask=valid_T[None, :] & (e_E < E)[:, None])

    if not tiles.is_last(arrived_ptr + tile, tl.num_programs(0) * tl.num_programs(1)):
        return

    _choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling, tile * BLOCK_T + tl.arange(0, TOKENS), T,
        tl.num_programs(1), E, K, SHARED, SIGMOID, BIAS, X, X_PADDED, G_PADDED, LIMIT, TOP_GROUPS, NORMALISE, SCALE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _choose_of_logits(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling, T,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    X: tl.constexpr, X_PADDED: tl.constexpr, G_PADDED: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of T."""
    pdl.wait(PDL)
    pdl.release(PDL)
    _choose(
        logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling, tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), T, 1,
        E, K, SHARED, SIGMOID, BIAS, X, X_PADDED, G_PADDED, LIMIT, TOP_GROUPS, NORMALISE, SCALE,
    )  # fmt: skip


def choose_experts(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    spec: ModelSpec,
    room: Scratch,
    shared: int = 0,
) -> Choice:
    """Route tokens ``x_TD`` (BF16). ``weight_ED`` BF16 or FP32; products and sums are FP32 either way.

    ``shared`` experts, numbered from E, are appended to each token's choices with weight 1.
    """
    name = "choose_experts"
    tokens, hidden = x_TD.shape
    experts, groups, choices = spec.n_routed_experts, spec.n_group, spec.num_experts_per_tok
    check(x_TD.dtype == torch.bfloat16 and x_TD.stride(1) == 1, f"tokens in {x_TD.dtype}", name)
    check(weight_ED.shape == (experts, hidden) and weight_ED.stride(1) == 1, f"weight {tuple(weight_ED.shape)}", name)
    check(weight_ED.dtype in (torch.bfloat16, torch.float32), f"weight in {weight_ED.dtype}", name)
    fits = bias_E is None or (bias_E.shape == (experts,) and bias_E.dtype == torch.float32)
    check(fits, "the bias must be float32, one number per expert", name)
    fits = tokens > LIBRARY_TOKENS or (room.logits_STE.shape[1] >= tokens and room.logits_STE.shape[2] == experts)
    check(fits, f"scratch {tuple(room.logits_STE.shape)} for {tokens} tokens", name)
    chip = chip_of(x_TD.device)
    out = Choice(
        torch.empty(tokens, choices + shared, dtype=torch.int32, device=x_TD.device),
        torch.empty(tokens, choices + shared, dtype=torch.float32, device=x_TD.device),
    )
    limit = groups > 1 and spec.topk_method != "greedy"
    per_group = experts // groups if limit else experts
    normalise = spec.norm_topk_prob and (choices > 1 or spec.scales_normalised_weights)
    rules = {
        "E": experts, "K": choices, "SHARED": shared, "SIGMOID": spec.scoring_func == "sigmoid",
        "BIAS": bias_E is not None, "X": per_group, "X_PADDED": power_of_2(per_group),
        "G_PADDED": power_of_2(groups) if limit else 1, "LIMIT": limit, "TOP_GROUPS": spec.topk_group,
        "NORMALISE": normalise, "SCALE": not normalise or spec.scales_normalised_weights,
        "PDL": chip.dependent_launch,
    }  # fmt: skip
    if tokens > LIBRARY_TOKENS:
        logits_TE = product_f32(x_TD, weight_ED)
        _choose_of_logits[(cdiv(tokens, BLOCK_T),)](
            logits_TE, bias_E, *out, spec.routed_scaling_factor, tokens, **rules, TOKENS=BLOCK_T, **options(chip, 4)
        )
        return out
    span = cdiv(cdiv(hidden, BLOCK_D), SPLITS) * BLOCK_D
    _route[(cdiv(experts, BLOCK_E), cdiv(hidden, span), cdiv(tokens, BLOCK_T))](
        x_TD, x_TD.stride(0), weight_ED, weight_ED.stride(0), bias_E, room.logits_STE, room.arrived, *out,
        spec.routed_scaling_factor, tokens, hidden, span, **rules, TOKENS=min(BLOCK_T, power_of_2(tokens)),
        BLOCK_T=BLOCK_T, MATRIX_T=MATRIX_T, BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D,
        STAGES=4 if chip.shared_memory >= 160 << 10 else 2, **options(chip, 4),
    )  # fmt: skip
    return out


def choose_experts_eager(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, spec: ModelSpec, shared: int = 0
) -> Choice:
    """The twin of `choose_experts`: FP32 logits through the neutral definition."""
    logits_TE = (x_TD.float() @ weight_ED.float().t()).cpu().numpy()
    ids, weights = route(spec, logits_TE, None if bias_E is None else bias_E.cpu().numpy())
    tokens, device = len(x_TD), x_TD.device
    shared_ids = torch.arange(spec.n_routed_experts, spec.n_routed_experts + shared, device=device).expand(tokens, -1)
    ones = torch.ones(tokens, shared, device=device)
    return Choice(
        torch.cat([torch.from_numpy(ids).to(device), shared_ids], 1).int(),
        torch.cat([torch.from_numpy(weights).to(device), ones], 1),
    )
