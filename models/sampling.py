"""Sampling as pure functions: the definition that every backend follows, and the reference's implementation of it.

A token is drawn by the Gumbel-max trick, argmax(logit / temperature + gumbel), over the tokens that top-k and top-p
keep. The noise is a hash of (seed, position, token id) instead of a random stream: no state, no order, so a request
gives the same tokens alone, in any batch, after a preemption and on another backend.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hash_u32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A 32-bit integer mixer (xor-shift and two odd multipliers; every input bit reaches every output bit)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def gumbel_noise(seed_B: NDArray[np.uint32], position_B: NDArray[np.int32], vocab_size: int) -> NDArray[np.float32]:
    """float32 [B, V] standard Gumbel noise for the token after ``position_B``.

    u = (upper 23 bits of the hash + 0.5) / 2**23 is exact in float32 and never 0 or 1.
    """
    row_B = hash_u32(hash_u32(seed_B.astype(np.uint32)) ^ position_B.astype(np.uint32))
    token_V = np.arange(vocab_size, dtype=np.uint32)
    bits_BV = hash_u32(row_B[:, None] ^ hash_u32(token_V)[None, :]) >> np.uint32(9)
    u_BV = (bits_BV.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(u_BV))


def keep_mask(
    logits_BV: NDArray[np.float32], top_k_B: NDArray[np.int32], top_p_B: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Tokens that may be drawn: the top_k best (0: all) and, of those, the fewest best whose probability reaches top_p.

    ``logits_BV`` are already divided by the temperature. Ties are broken towards the lower token id.
    """
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")
    sorted_BV = np.take_along_axis(logits_BV, order_BV, axis=1)
    rank_V = np.arange(logits_BV.shape[1])
    limit_B = np.where(top_k_B > 0, top_k_B, logits_BV.shape[1])
    sorted_BV = np.where(rank_V < limit_B[:, None], sorted_BV, -np.inf)
    weight_BV = np.exp(sorted_BV - sorted_BV[:, :1])
    probability_BV = weight_BV / weight_BV.sum(axis=1, keepdims=True)
    before_BV = np.cumsum(probability_BV, axis=1) - probability_BV
    kept_sorted_BV = (before_BV < top_p_B[:, None]) & np.isfinite(sorted_BV)
    kept_sorted_BV[:, 0] = True
    kept_BV = np.zeros_like(kept_sorted_BV)
    np.put_along_axis(kept_BV, order_BV, kept_sorted_BV, axis=1)
    return kept_BV


def sample(
    logits_BV: NDArray[np.float32],
    position_B: NDArray[np.int32],
    temperature_B: NDArray[np.float32],
    top_k_B: NDArray[np.int32],
    top_p_B: NDArray[np.float32],
    seed_B: NDArray[np.uint32],
) -> NDArray[np.int32]:
    """The next token of each row: argmax at temperature 0, else a draw. ``position_B`` is that of the last input."""
    greedy_B = logits_BV.argmax(axis=1)
    scaled_BV = logits_BV / np.where(temperature_B > 0, temperature_B, 1)[:, None]
    kept_BV = keep_mask(scaled_BV, top_k_B, top_p_B)
    noisy_BV = np.where(kept_BV, scaled_BV + gumbel_noise(seed_B, position_B, logits_BV.shape[1]), -np.inf)
    return np.where(temperature_B > 0, noisy_BV.argmax(axis=1), greedy_B).astype(np.int32)
