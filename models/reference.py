"""The numpy reference: the whole forward pass in float32, written to be read beside the paper, not to be fast.

Every backend is compared with it. Both forms of MLA are here: *naive* expands keys and values from the latent for every
head; *absorbed* moves ``kv_b_proj`` to the query and to the output, so that attention runs on the cached latent itself.
Sources: DeepSeek-V2 section 2.1 (MLA), DeepSeek-V3 sections 2.1 and 2.2 (MoE, MTP).

Shape letters: T new tokens, S visible tokens (cached and new), H heads, N nope dim, R rope dim, V value dim, C latent
(kv_lora_rank), D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .rope import rope_tables, softmax_scale
from .routing import route
from .spec import ModelSpec

FloatArray = NDArray[np.float32]
Form = Literal["naive", "absorbed", "auto"]


class LatentCache(Protocol):
    """One sequence's cache: per layer and token, the normed latent and the rotated rope key."""

    length: int  # tokens before this step

    def append(self, layer: int, entries_TX: FloatArray) -> FloatArray:
        """Store the new tokens' entries, X = C + R values each, and return all visible ones, [S, X]."""


class GrowingCache:
    """A LatentCache in plain arrays, for use without blocks."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, FloatArray] = {}

    def append(self, layer: int, entries_TX: FloatArray) -> FloatArray:
        known = self._layers.get(layer, entries_TX[:0])
        self._layers[layer] = np.concatenate([known[: self.length], entries_TX])
        return self._layers[layer]


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)))


def silu(x: FloatArray) -> FloatArray:
    """x * sigmoid(x), without overflow for large negative x."""
    return x * np.float32(0.5) * (np.float32(1) + np.tanh(x * np.float32(0.5)))


def softmax(x: FloatArray) -> FloatArray:
    """Over the last axis; -inf entries get probability 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x: FloatArray, cos: FloatArray, sin: FloatArray, interleave: bool) -> FloatArray:
    """RoPE on the last axis: pairs (x0, x1), (x2, x3), … when interleaved, else (x0, x_half), …"""
    if interleave:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def causal_mask(queries: int, visible: int) -> FloatArray:
    """[T, S]: 0 where query t, the (S - T + t)-th token, may look, -inf after it."""
    later = np.arange(visible)[None, :] > np.arange(visible - queries, visible)[:, None]
    return np.where(later, np.float32(-np.inf), np.float32(0))


def attend_naive(
    q_nope_THN: FloatArray, q_rope_THR: FloatArray, entries_SX: FloatArray, kv_b_HYC: FloatArray, scale: float
) -> FloatArray:
    """Expanded MLA, [T, H, V]: per head, k = [W_k c | k_rope] and v = W_v c; Y = N + V rows of kv_b per head."""
    nope, latent = q_nope_THN.shape[2], kv_b_HYC.shape[2]
    latent_SC, k_rope_SR = entries_SX[:, :latent], entries_SX[:, latent:]
    kv_SHY = np.einsum("sc,hyc->shy", latent_SC, kv_b_HYC, optimize=True)
    k_nope_SHN, v_SHV = kv_SHY[:, :, :nope], kv_SHY[:, :, nope:]
    scores_HTS = np.einsum("thn,shn->hts", q_nope_THN, k_nope_SHN, optimize=True)
    scores_HTS += np.einsum("thr,sr->hts", q_rope_THR, k_rope_SR, optimize=True)
    weights_HTS = softmax(scores_HTS * np.float32(scale) + causal_mask(len(q_nope_THN), len(entries_SX)))
    return np.einsum("hts,shv->thv", weights_HTS, v_SHV, optimize=True)


def attend_absorbed(
    q_nope_THN: FloatArray, q_rope_THR: FloatArray, entries_SX: FloatArray, kv_b_HYC: FloatArray, scale: float
) -> FloatArray:
    """The same result as `attend_naive`, as multi-query attention on the latent: nothing is expanded per token."""
    nope, latent = q_nope_THN.shape[2], kv_b_HYC.shape[2]
    w_k_HNC, w_v_HVC = kv_b_HYC[:, :nope], kv_b_HYC[:, nope:]
    q_latent_THC = np.einsum("thn,hnc->thc", q_nope_THN, w_k_HNC, optimize=True)
    q_THX = np.concatenate([q_latent_THC, q_rope_THR], axis=2)
    scores_HTS = np.einsum("thx,sx->hts", q_THX, entries_SX, optimize=True)
    weights_HTS = softmax(scores_HTS * np.float32(scale) + causal_mask(len(q_nope_THN), len(entries_SX)))
    context_THC = np.einsum("hts,sc->thc", weights_HTS, entries_SX[:, :latent], optimize=True)
    return np.einsum("thc,hvc->thv", context_THC, w_v_HVC, optimize=True)


class ReferenceModel:
    """The model over float32 weights by canonical name. ``form`` picks the MLA form; auto is absorbed for decode."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, FloatArray], max_positions: int, form: Form = "auto"):
        self.spec = spec
        self.form = form
        self._weights = weights
        self._cos, self._sin = rope_tables(spec, max_positions)
        self._scale = softmax_scale(spec)

    def hidden(
        self, token_ids_T: NDArray[np.int32], caches: Sequence[LatentCache], query_lens: Sequence[int]
    ) -> FloatArray:
        """Hidden states [T, D] before the final norm of a ragged batch; its sequences' caches grow."""
        x_TD = self._weights["model.embed_tokens.weight"][token_ids_T]
        for layer in range(self.spec.num_hidden_layers):
            x_TD = self._block(layer, x_TD, caches, query_lens)
        return x_TD

    def logits(self, hidden_TD: FloatArray) -> FloatArray:
        """[T, vocab] from hidden states before the final norm."""
        return self._norm("model.norm", hidden_TD) @ self._weights["lm_head.weight"].T

    def mtp_logits(
        self,
        hidden_TD: FloatArray,
        next_token_ids_T: NDArray[np.int32],
        caches: Sequence[LatentCache],
        query_lens: Sequence[int],
    ) -> FloatArray:
        """Logits [T, vocab] for the token after the next, from the main hidden states and the next tokens.

        The caches must still have the length that they had before `hidden` was called with the same tokens.
        """
        layer = self.spec.num_hidden_layers
        prefix = f"model.layers.{layer}"
        if self.spec.mtp_hidden == "post_norm":
            hidden_TD = self._norm("model.norm", hidden_TD)
        embedding_TD = self._weights[f"{prefix}.embed_tokens.weight"][next_token_ids_T]
        joined_TD2 = np.concatenate(
            [self._norm(f"{prefix}.enorm", embedding_TD), self._norm(f"{prefix}.hnorm", hidden_TD)], axis=1
        )
        x_TD = joined_TD2 @ self._weights[f"{prefix}.eh_proj.weight"].T
        x_TD = self._block(layer, x_TD, caches, query_lens)
        return self._norm(f"{prefix}.shared_head.norm", x_TD) @ self._weights[f"{prefix}.shared_head.head.weight"].T

    def _block(
        self, layer: int, x_TD: FloatArray, caches: Sequence[LatentCache], query_lens: Sequence[int]
    ) -> FloatArray:
        prefix = f"model.layers.{layer}"
        x_TD = x_TD + self._attention(layer, self._norm(f"{prefix}.input_layernorm", x_TD), caches, query_lens)
        normed_TD = self._norm(f"{prefix}.post_attention_layernorm", x_TD)
        if self.spec.is_moe(layer):
            return x_TD + self._moe(f"{prefix}.mlp", normed_TD)
        return x_TD + self._swiglu(f"{prefix}.mlp", normed_TD)

    def _attention(
        self, layer: int, x_TD: FloatArray, caches: Sequence[LatentCache], query_lens: Sequence[int]
    ) -> FloatArray:
        spec, prefix = self.spec, f"model.layers.{layer}.self_attn"
        positions_T = np.concatenate(
            [cache.length + np.arange(count) for cache, count in zip(caches, query_lens, strict=True)]
        )
        cos_TR, sin_TR = self._cos[positions_T], self._sin[positions_T]
        q_THX = self._queries(prefix, x_TD).reshape(len(x_TD), spec.num_attention_heads, spec.qk_head_dim)
        q_nope_THN, q_rope_THR = np.split(q_THX, [spec.qk_nope_head_dim], axis=2)
        q_rope_THR = rotate(q_rope_THR, cos_TR[:, None], sin_TR[:, None], spec.rope_interleave)
        entries_TX = self._cache_entries(prefix, x_TD, cos_TR, sin_TR)
        kv_b_HYC = self._weights[f"{prefix}.kv_b_proj.weight"].reshape(
            spec.num_attention_heads, spec.qk_nope_head_dim + spec.v_head_dim, spec.kv_lora_rank
        )
        outputs = []
        for cache, rows in zip(caches, _row_slices(query_lens), strict=True):
            visible_SX = cache.append(layer, entries_TX[rows])
            attend = self._attend(rows.stop - rows.start)
            outputs.append(attend(q_nope_THN[rows], q_rope_THR[rows], visible_SX, kv_b_HYC, self._scale))
        return np.concatenate(outputs).reshape(len(x_TD), -1) @ self._weights[f"{prefix}.o_proj.weight"].T

    def _attend(self, queries: int) -> Callable[..., FloatArray]:
        absorbed = self.form == "absorbed" or (self.form == "auto" and queries == 1)
        return attend_absorbed if absorbed else attend_naive

    def _queries(self, prefix: str, x_TD: FloatArray) -> FloatArray:
        if self.spec.q_lora_rank is None:
            return x_TD @ self._weights[f"{prefix}.q_proj.weight"].T
        latent = x_TD @ self._weights[f"{prefix}.q_a_proj.weight"].T
        latent = rms_norm(latent, self._weights[f"{prefix}.q_a_layernorm.weight"], self.spec.latent_norm_eps)
        return latent @ self._weights[f"{prefix}.q_b_proj.weight"].T

    def _cache_entries(self, prefix: str, x_TD: FloatArray, cos_TR: FloatArray, sin_TR: FloatArray) -> FloatArray:
        """What is cached per token: [normed latent | rotated rope key]; the norm covers the latent only."""
        compressed = x_TD @ self._weights[f"{prefix}.kv_a_proj_with_mqa.weight"].T
        latent_TC, k_rope_TR = np.split(compressed, [self.spec.kv_lora_rank], axis=1)
        weight = self._weights[f"{prefix}.kv_a_layernorm.weight"]
        latent_TC = rms_norm(latent_TC, weight, self.spec.latent_norm_eps)
        return np.concatenate([latent_TC, rotate(k_rope_TR, cos_TR, sin_TR, self.spec.rope_interleave)], axis=1)

    def _moe(self, prefix: str, x_TD: FloatArray) -> FloatArray:
        bias_E = self._weights[f"{prefix}.gate.e_score_correction_bias"] if self.spec.has_router_bias else None
        index_TK, weight_TK = route(self.spec, x_TD @ self._weights[f"{prefix}.gate.weight"].T, bias_E)
        y_TD = np.zeros_like(x_TD)
        for expert in np.unique(index_TK):
            token, slot = np.nonzero(index_TK == expert)
            y_TD[token] += weight_TK[token, slot, None] * self._swiglu(f"{prefix}.experts.{expert}", x_TD[token])
        if self.spec.n_shared_experts:
            y_TD += self._swiglu(f"{prefix}.shared_experts", x_TD)
        return y_TD

    def _swiglu(self, prefix: str, x_TD: FloatArray) -> FloatArray:
        gate = x_TD @ self._weights[f"{prefix}.gate_proj.weight"].T
        up = x_TD @ self._weights[f"{prefix}.up_proj.weight"].T
        return (silu(gate) * up) @ self._weights[f"{prefix}.down_proj.weight"].T

    def _norm(self, name: str, x: FloatArray) -> FloatArray:
        return rms_norm(x, self._weights[f"{name}.weight"], self.spec.rms_norm_eps)


def _row_slices(lengths: Iterable[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = np.cumsum(list(lengths))
    return [slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
