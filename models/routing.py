"""Expert routing for the four variants of the family, as pure functions on float32 numpy arrays.

Shape letters: T tokens, E experts, G groups, K experts per token. Sources: DeepSeek-V2 section 2.2.3 (softmax, greedy
and group-limited), DeepSeek-V3 section 2.1.2 (sigmoid with a selection-only bias, ``noaux_tc``); Kimi-K2 and Moonlight
are the latter with one group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .spec import ModelSpec

FloatArray = NDArray[np.float32]
NORMALISE_EPSILON = np.float32(1e-20)


def route(spec: ModelSpec, logits_TE: FloatArray, bias_E: FloatArray | None) -> tuple[NDArray[np.int64], FloatArray]:
    """Choose experts: (indices [T, K], weights float32 [T, K]). ``bias_E`` steers the choice, never the weights."""
    scores_TE = _scores(spec, logits_TE)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.n_group > 1 and spec.topk_method != "greedy":
        choice_TE = _limit_groups(spec, choice_TE)
    index_TK = _top(choice_TE, spec.num_experts_per_tok)
    return index_TK, _weights(spec, np.take_along_axis(scores_TE, index_TK, axis=1))


def _scores(spec: ModelSpec, logits_TE: FloatArray) -> FloatArray:
    if spec.scoring_func == "sigmoid":
        return _sigmoid(logits_TE)
    shifted = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _sigmoid(x: FloatArray) -> FloatArray:
    """1 / (1 + e^-x) without overflow: e^-|x| is at most 1."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, np.float32(1), small) / (np.float32(1) + small)


def _limit_groups(spec: ModelSpec, choice_TE: FloatArray) -> FloatArray:
    """Mask all but the best ``topk_group`` groups. V3 scores a group by its two best experts, V2 by its best."""
    choice_TGX = choice_TE.reshape(len(choice_TE), spec.n_group, -1)
    if spec.topk_method == "noaux_tc":
        group_TG = np.sort(choice_TGX, axis=2)[:, :, -2:].sum(axis=2)
        masked = -np.inf  # biased scores may be negative, so 0 would let a masked expert win
    else:
        group_TG = choice_TGX.max(axis=2)
        masked = 0.0
    kept_TG = np.zeros(group_TG.shape, dtype=bool)
    np.put_along_axis(kept_TG, _top(group_TG, spec.topk_group), True, axis=1)
    return np.where(kept_TG[:, :, None], choice_TGX, np.float32(masked)).reshape(choice_TE.shape)


def _top(values: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest per row, best first, ties towards the lower index."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def _weights(spec: ModelSpec, chosen_TK: FloatArray) -> FloatArray:
    normalise = spec.norm_topk_prob and (spec.num_experts_per_tok > 1 or spec.scales_normalised_weights)
    if normalise:
        chosen_TK = chosen_TK / (chosen_TK.sum(axis=1, keepdims=True) + NORMALISE_EPSILON)
        if not spec.scales_normalised_weights:
            return chosen_TK
    return chosen_TK * np.float32(spec.routed_scaling_factor)
