"""Router logits in FP32, scores and group-limited top-k, in one launch.

Programs share the product by experts and channels; the last program of a token tile to finish adds the partial logits
in their order and chooses. Ties go to the lower index, as in `models.routing.route`, which is the definition.
Weights are read before the kernel ahead has ended. A choice is a chain of some twenty reductions: one warp has all the
scores of a token, so that none of them waits for other warps, and they are of integers, which is one instruction.

Shape letters: T tokens, E experts, G groups, R rows of a group, L experts of a row (lanes of a warp), K choices, D
channels, P parts of a split's channels, S splits of D.
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
from .chips import Chip, check, chip_of, options
from .sizes import cdiv, power_of_2

BLOCK_T = 8  # the fewest tokens of a tile
WARPS = 8
SPLITS = 8  # at most
LANES = 32
LIBRARY_TOKENS = 512  # beyond, a library's product of the logits is faster, and its launch does not count
MASKED = tl.constexpr(-3e38)  # below every score, above what is taken or padding
TAKEN = tl.constexpr(0x7FFFFF - 2**31)  # what `_ordered` makes of -inf
_HELD = ("first", "routed", "first_token", "last_token")  # what kernels are told of `Held`


class Config(NamedTuple):
    """Tiles. ``parts`` alone decides in which order a logit is added, so that no result depends on the batch."""

    block_t: int  # tokens, for which one program chooses; at least as many as warps
    block_e: int
    warps: int
    parts: int  # of a split's channels, which warps share
    registers: int | None = None  # that a thread may use, so that two programs fit on a processor


def choose(tokens: int, weight_ED: torch.Tensor, chip: Chip) -> Config:
    """Few tokens: each processor has a piece of the weights. More: larger tiles read weights and tokens less often."""
    if tokens <= 16 or weight_ED.dtype == torch.float32 or chip.shared_memory < 160 << 10:
        return Config(BLOCK_T, 16, WARPS, 8)
    return Config(2 * BLOCK_T, 32, WARPS, 8, 128)


class Choice(NamedTuple):
    ids: torch.Tensor  # int32 [T, K + shared]: chosen experts, best first, then the shared ones
    weights: torch.Tensor  # float32 [T, K + shared]: 1 for the shared ones


class Held(NamedTuple):
    """What a rank's stack has: routed experts from ``first`` on, then the shared ones, for ``tokens`` of a step's.

    A choice that is not there, of an expert elsewhere or a shared one for another rank's token, gets the number after
    the stack's last.
    """

    first: int
    routed: int
    tokens: range


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
def _flipped(bits):
    """Between the bits of floats and integers that are ordered as the floats are."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered(values):
    return _flipped(values.to(tl.int32, bitcast=True))


@triton.jit
def _floats(keys):
    return _flipped(keys).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x_TGRL):
    """Of each token. In a warp's registers first."""
    return tl.max(tl.max(tl.max(x_TGRL, 1), 1), 1)


@triton.jit
def _first(where_TGRL, index_TGRL):
    """The lowest index of each token ``where`` holds."""
    return tl.min(tl.min(tl.min(tl.where(where_TGRL, index_TGRL, 0x7FFFFFFF), 1), 1), 1)


@triton.jit
def _group_scores(key_TGRL, SIGMOID: tl.constexpr):
    """V3 scores a group by its two best experts, V2 by its best."""
    best_TG = tl.max(tl.max(key_TGRL, 2), 2)
    score_TG = _floats(best_TG)
    if SIGMOID:
        is_best_TGRL = key_TGRL == best_TG[:, :, None, None]
        others_TG = tl.max(tl.max(tl.where(is_best_TGRL, TAKEN, key_TGRL), 2), 2)
        twice_TG = tl.sum(tl.sum(is_best_TGRL.to(tl.int32), 2), 2) > 1
        score_TG += _floats(tl.where(twice_TG, best_TG, others_TG))
    return score_TG


@triton.jit
def _kept_groups(score_TG, TOP_GROUPS: tl.constexpr):
    """The groups that fewer are better than. Each lane of a warp counts for one group H."""
    g_G = tl.arange(0, score_TG.shape[1])
    g_1G1, h_11H, score_TG1 = g_G[None, :, None], g_G[None, None, :], score_TG[:, :, None]
    score_T1H = tl.max(tl.where(g_1G1 == h_11H, score_TG1, float("-inf")), 1)[:, None, :]
    better_TGH = (score_TG1 > score_T1H) | ((score_TG1 == score_T1H) & (g_1G1 < h_11H))
    kept_TH = tl.sum(better_TGH.to(tl.int32), 1) < TOP_GROUPS
    bits_T = tl.sum(kept_TH.to(tl.int32) << g_G[None, :], 1)
    return (bits_T[:, None] >> g_G[None, :]) & 1 == 1


@triton.jit
def _scores(logits_TGRL, valid_1GRL, SIGMOID: tl.constexpr):
    if SIGMOID:
        small_TGRL = tl.exp(-tl.abs(logits_TGRL))
        scores_TGRL = tl.where(logits_TGRL >= 0, 1.0, small_TGRL) / (1.0 + small_TGRL)
    else:
        inside_TGRL = tl.where(valid_1GRL, logits_TGRL, float("-inf"))
        shifted_TGRL = tl.exp(inside_TGRL - _largest(inside_TGRL)[:, None, None, None])
        scores_TGRL = shifted_TGRL / tl.sum(tl.sum(tl.sum(shifted_TGRL, 1), 1), 1)[:, None, None, None]
    return scores_TGRL


@triton.jit
def _experts(E: tl.constexpr, X: tl.constexpr, G: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """The expert at each place, [1, G, R, L], and whether there is one."""
    place_RL = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    expert_GRL = (tl.arange(0, G) * X)[:, None, None] + place_RL[None, :, :]
    valid_GRL = (place_RL < X)[None, :, :] & (expert_GRL < E)
    return expert_GRL[None, :, :, :], valid_GRL[None, :, :, :]


@triton.jit
def _bias(
    bias_ptr, bias_stride, E: tl.constexpr, X: tl.constexpr, G: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """[T, G, R, L], the same for each token, as the scores will lie."""
    expert_1GRL, valid_1GRL = _experts(E, X, G, R, L)
    if bias_ptr is None:
        bias_TGRL = tl.zeros((TOKENS, G, R, L), tl.float32)
    else:
        ptrs_TGRL = tl.broadcast_to(bias_ptr + expert_1GRL * bias_stride, (TOKENS, G, R, L))
        bias_TGRL = tl.load(ptrs_TGRL, mask=tl.broadcast_to(valid_1GRL, ptrs_TGRL.shape), other=0.0)
    return bias_TGRL


@triton.jit
def _choose(
    logits_ptr, pitch, bias_TGRL, ids_ptr, weights_ptr, scaling, row_T, T, first, routed, first_token, last_token,
    HELD: tl.constexpr, SPLITS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    SIGMOID: tl.constexpr, X: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """The choices of tokens ``row_T`` from partial logits [S, T, E], added in their order.

    HELD: numbers are those of a stack, `Held`. ``pitch``: of a row of logits. What is known of it decides how scores
    lie. Nothing is: lanes then load single numbers, L is along the lanes and T along the warps. The same goes for the
    bias and its stride.
    """
    G: tl.constexpr = bias_TGRL.shape[1]
    R: tl.constexpr = bias_TGRL.shape[2]
    L: tl.constexpr = bias_TGRL.shape[3]
    TOKENS: tl.constexpr = row_T.shape[0]
    COLUMNS: tl.constexpr = triton.next_power_of_2(max(K + SHARED, L))  # no fewer than lanes: they need no exchange
    expert_1GRL, valid_1GRL = _experts(E, X, G, R, L)
    mask_TGRL = (row_T < T)[:, None, None, None] & valid_1GRL
    logits_TGRL = tl.zeros((TOKENS, G, R, L), tl.float32)
    for split in tl.static_range(SPLITS):
        ptrs_TGRL = logits_ptr + ((split * T + row_T) * pitch)[:, None, None, None] + expert_1GRL
        logits_TGRL += tl.load(ptrs_TGRL, mask=mask_TGRL, other=0.0, cache_modifier=".cg")

    scores_TGRL = _scores(logits_TGRL, valid_1GRL, SIGMOID)
    key_TGRL = tl.where(valid_1GRL, _ordered(scores_TGRL + bias_TGRL), TAKEN)
    if LIMIT:
        kept_TG = _kept_groups(_group_scores(key_TGRL, SIGMOID), TOP_GROUPS)
        masked = _ordered(tl.full((), MASKED if SIGMOID else 0.0, tl.float32))
        key_TGRL = tl.where(kept_TG[:, :, None, None] | ~valid_1GRL, key_TGRL, masked)

    index_TGRL = tl.broadcast_to(tl.where(valid_1GRL, expert_1GRL, E), key_TGRL.shape)
    score_bits_TGRL = scores_TGRL.to(tl.int32, bitcast=True)  # no score is negative
    k_1K = tl.arange(0, COLUMNS)[None, :]
    id_TK = tl.broadcast_to(E - K + k_1K, (TOKENS, COLUMNS))
    weight_TK = tl.zeros((TOKENS, COLUMNS), tl.float32)
    sum_T = tl.zeros((TOKENS,), tl.float32)
    for k in tl.static_range(K):
        best_T = _first(key_TGRL == _largest(key_TGRL)[:, None, None, None], index_TGRL)
        is_best_TGRL = index_TGRL == best_T[:, None, None, None]
        key_TGRL = tl.where(is_best_TGRL, TAKEN, key_TGRL)
        score_T = _largest(tl.where(is_best_TGRL, score_bits_TGRL, 0)).to(tl.float32, bitcast=True)
        id_TK = tl.where(k_1K == k, best_T[:, None], id_TK)
        weight_TK = tl.where(k_1K == k, score_T[:, None], weight_TK)
        sum_T += score_T
    if NORMALISE:
        weight_TK = weight_TK / (sum_T + 1e-20)[:, None]
    if SCALE:
        weight_TK *= scaling
    weight_TK = tl.where(k_1K < K, weight_TK, 1.0)
    if HELD:
        is_ours_T = (row_T >= first_token) & (row_T < last_token)
        id_TK = _in_stack(id_TK, is_ours_T, first, routed, E, SHARED)
    out_TK = row_T[:, None] * (K + SHARED) + k_1K
    mask_TK = (row_T < T)[:, None] & (k_1K < K + SHARED)
    tl.store(ids_ptr + out_TK, id_TK, mask=mask_TK)
    tl.store(weights_ptr + out_TK, weight_TK, mask=mask_TK)


@triton.jit
def _in_stack(id_TK, is_ours_T, first, routed, E: tl.constexpr, SHARED: tl.constexpr):
    """Of chosen experts, and shared ones from E on."""
    own_TK = id_TK - first
    is_own_TK = (own_TK >= 0) & (own_TK < routed) & (id_TK < E)
    shared_TK = tl.where((id_TK >= E) & is_ours_T[:, None], id_TK - E, SHARED)
    return tl.where(is_own_TK, own_TK, routed + shared_TK)


@triton.jit(do_not_specialize=["T", "pitch", "bias_stride", *_HELD])
def _route(
    x_ptr, x_stride, w_ptr, w_stride, bias_ptr, bias_stride, logits_ptr, pitch, arrived_ptr, ids_ptr, weights_ptr,
    scaling, T, D, first, routed, first_token, last_token, HELD: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr, X: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of E, splits of D, tiles of T. What no kernel ahead writes is read before the wait for it."""
    tile = tl.program_id(2)
    t_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_E = tl.minimum(e_E, E - 1)
    part_P = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    d_PD = (part_P * PART)[:, None] + tl.arange(0, PART)[None, :]
    w_mask_PED = tl.broadcast_to((d_PD < D)[:, None, :], (PARTS, BLOCK_E, PART))
    w_PED = tl.load(w_ptr + (row_E * w_stride)[None, :, None] + d_PD[:, None, :], mask=w_mask_PED, other=0.0)
    bias_TGRL = _bias(bias_ptr, bias_stride, E, X, G, R, L, BLOCK_T)
    pdl.wait(PDL)
    pdl.release(PDL)
    x_mask_PTD = (t_T < T)[None, :, None] & (d_PD < D)[:, None, :]
    x_PTD = tl.load(x_ptr + (t_T * x_stride)[None, :, None] + d_PD[:, None, :], mask=x_mask_PTD, other=0.0)
    product_PET = tl.dot(w_PED, tl.permute(x_PTD, (0, 2, 1)).to(w_PED.dtype), input_precision="ieee")
    # Pairs in a thread's registers: what warps have to exchange goes through shared memory once.
    pairs_ETQ2 = tl.reshape(tl.permute(product_PET, (1, 2, 0)), (BLOCK_E, BLOCK_T, PARTS // 2, 2))
    even_ETQ, odd_ETQ = tl.split(pairs_ETQ2)
    split_ptr = logits_ptr + tl.program_id(1) * T * pitch
    place_ET = t_T[None, :] * pitch + e_E[:, None]
    tl.store(split_ptr + place_ET, tl.sum(even_ETQ + odd_ETQ, 2), mask=(t_T < T)[None, :] & (e_E < E)[:, None])
    if tiles.is_last(arrived_ptr + tile, tl.num_programs(0) * tl.num_programs(1)):
        _choose(
            logits_ptr, pitch, bias_TGRL, ids_ptr, weights_ptr, scaling, t_T, T, first, routed, first_token,
            last_token, HELD, SPLITS, E, K, SHARED, SIGMOID, X, LIMIT, TOP_GROUPS, NORMALISE, SCALE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "pitch", "bias_stride", *_HELD])
def _choose_of_logits(
    logits_ptr, pitch, bias_ptr, bias_stride, ids_ptr, weights_ptr, scaling, T, first, routed, first_token, last_token,
    HELD: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, LIMIT: tl.constexpr, TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr, SCALE: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of T."""
    bias_TGRL = _bias(bias_ptr, bias_stride, E, X, G, R, L, BLOCK_T)
    pdl.wait(PDL)
    pdl.release(PDL)
    _choose(
        logits_ptr, pitch, bias_TGRL, ids_ptr, weights_ptr, scaling,
        tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), T, first, routed, first_token, last_token, HELD, 1, E, K,
        SHARED, SIGMOID, X, LIMIT, TOP_GROUPS, NORMALISE, SCALE,
    )  # fmt: skip


def choose_experts(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    spec: ModelSpec,
    room: Scratch,
    shared: int = 0,
    config: Config | None = None,
    held: Held | None = None,
) -> Choice:
    """Route tokens ``x_TD`` (BF16). ``weight_ED`` BF16 or FP32; products and sums are FP32 either way.

    ``shared`` experts, numbered from E, are appended to each token's choices with weight 1. With ``held`` numbers are
    those of a rank's stack.
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
    check(groups <= LANES, f"{groups} groups", name)
    check(fits, f"scratch {tuple(room.logits_STE.shape)} for {tokens} tokens", name)
    chip = chip_of(x_TD.device)
    out = Choice(
        torch.empty(tokens, choices + shared, dtype=torch.int32, device=x_TD.device),
        torch.empty(tokens, choices + shared, dtype=torch.float32, device=x_TD.device),
    )
    limited = groups > 1 and spec.topk_method != "greedy"
    per_group = experts // groups if limited else experts
    normalise = spec.norm_topk_prob and (choices > 1 or spec.scales_normalised_weights)
    bias_stride = 0 if bias_E is None else bias_E.stride(0)
    numbers = (0,) * 4 if held is None else (held.first, held.routed, held.tokens.start, held.tokens.stop)
    lanes = min(LANES, power_of_2(per_group))
    rules = {
        "HELD": held is not None, "E": experts, "K": choices, "SHARED": shared,
        "SIGMOID": spec.scoring_func == "sigmoid", "X": per_group, "G": power_of_2(groups) if limited else 1,
        "R": power_of_2(per_group) // lanes, "L": lanes, "LIMIT": limited, "TOP_GROUPS": spec.topk_group,
        "NORMALISE": normalise, "SCALE": not normalise or spec.scales_normalised_weights, "PDL": chip.dependent_launch,
    }  # fmt: skip
    if tokens > LIBRARY_TOKENS:
        logits_TE = product_f32(x_TD, weight_ED)
        _choose_of_logits[(cdiv(tokens, BLOCK_T),)](
            logits_TE, experts, bias_E, bias_stride, *out, spec.routed_scaling_factor, tokens, *numbers, **rules,
            BLOCK_T=BLOCK_T, **options(chip, WARPS),
        )  # fmt: skip
        return out
    config = config or choose(tokens, weight_ED, chip)
    part = max(16, power_of_2(cdiv(hidden, SPLITS)) // config.parts)
    splits = cdiv(hidden, part * config.parts)
    limit = {"maxnreg": config.registers} if config.registers and chip.name.startswith("sm_") else {}
    _route[(cdiv(experts, config.block_e), splits, cdiv(tokens, config.block_t))](
        x_TD, x_TD.stride(0), weight_ED, weight_ED.stride(0), bias_E, bias_stride, room.logits_STE, experts,
        room.arrived, *out, spec.routed_scaling_factor, tokens, hidden, *numbers, **rules, BLOCK_T=config.block_t,
        BLOCK_E=config.block_e, PARTS=config.parts, PART=part, SPLITS=splits, **options(chip, config.warps), **limit,
    )  # fmt: skip
    return out


def choose_experts_eager(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    spec: ModelSpec,
    shared: int = 0,
    held: Held | None = None,
) -> Choice:
    """The twin of `choose_experts`: FP32 logits through the neutral definition."""
    logits_TE = (x_TD.float() @ weight_ED.float().t()).cpu().numpy()
    ids, weights = route(spec, logits_TE, None if bias_E is None else bias_E.cpu().numpy())
    tokens, device = len(x_TD), x_TD.device
    shared_ids = torch.arange(spec.n_routed_experts, spec.n_routed_experts + shared, device=device).expand(tokens, -1)
    ids_TP = torch.cat([torch.from_numpy(ids).to(device), shared_ids], 1).int()
    if held is not None:
        nowhere = held.routed + shared
        number_X = torch.full((spec.n_routed_experts + shared,), nowhere, dtype=torch.int32, device=device)
        number_X[held.first : held.first + held.routed] = torch.arange(held.routed, dtype=torch.int32, device=device)
        number_X[spec.n_routed_experts :] = torch.arange(held.routed, nowhere, dtype=torch.int32, device=device)
        ids_TP = number_X[ids_TP.long()]
        ids_TP[: held.tokens.start, spec.num_experts_per_tok :] = nowhere
        ids_TP[held.tokens.stop :, spec.num_experts_per_tok :] = nowhere
    ones = torch.ones(tokens, shared, device=device)
    return Choice(ids_TP, torch.cat([torch.from_numpy(weights).to(device), ones], 1))
