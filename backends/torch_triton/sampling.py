"""`models.sampling` in PyTorch: the same hash, the same filters, so equal logits give equal tokens.

PyTorch lacks unsigned arithmetic, so 32-bit words travel in int64. Shape letters: O outputs, F outputs that are
filtered, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hash_u32(x: Tensor) -> Tensor:
    """`models.sampling.hash_u32` on words held in int64; a product that overflows keeps its low 32 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gumbel_noise(seed_O: Tensor, position_O: Tensor, tokens: range) -> Tensor:
    """float32 [O, tokens]; ``seed_O`` and ``position_O`` are int64."""
    row_O = hash_u32(hash_u32(seed_O) ^ position_O)
    token_V = torch.arange(tokens.start, tokens.stop, device=seed_O.device)
    bits_OV = hash_u32(row_O[:, None] ^ hash_u32(token_V)[None]) >> 9
    return -torch.log(-torch.log((bits_OV.float() + 0.5) * 2.0**-23))


def filtered(logits_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """The logits, -inf where `models.sampling.keep_mask` is false."""
    sorted_FV, order_FV = logits_FV.sort(dim=1, descending=True, stable=True)
    limit_F = torch.where(top_k_F > 0, top_k_F, logits_FV.shape[1])
    rank_V = torch.arange(logits_FV.shape[1], device=logits_FV.device)
    sorted_FV = sorted_FV.masked_fill(rank_V >= limit_F[:, None], float("-inf"))
    probability_FV = sorted_FV.softmax(dim=1)
    dropped_FV = probability_FV.cumsum(dim=1) - probability_FV >= top_p_F[:, None]
    dropped_FV[:, 0] = False
    return torch.full_like(logits_FV, float("-inf")).scatter_(
        1, order_FV, sorted_FV.masked_fill(dropped_FV, float("-inf"))
    )


def sample(
    logits_OV: Tensor, position_O: Tensor, temperature_O: Tensor, top_k_O: Tensor, top_p_O: Tensor, seed_O: Tensor
) -> Tensor:
    """The next token of each output, int64 [O]: argmax at temperature 0, else a draw."""
    token_O = logits_OV.argmax(dim=1)
    drawn = (temperature_O > 0).nonzero()[:, 0]
    if len(drawn):
        scaled = logits_OV[drawn] / temperature_O[drawn, None]
        limited = ((top_k_O[drawn] > 0) | (top_p_O[drawn] < 1)).nonzero()[:, 0]
        if len(limited):
            scaled[limited] = filtered(scaled[limited], top_k_O[drawn][limited], top_p_O[drawn][limited])
        noise = gumbel_noise(seed_O[drawn], position_O[drawn], range(logits_OV.shape[1]))
        token_O[drawn] = (scaled + noise).argmax(dim=1)
    return token_O
