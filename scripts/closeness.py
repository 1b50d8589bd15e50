"""How close two arrays of logits are.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..backends.base import FloatArray
from ..models.errors import InputError


@dataclass(frozen=True)
class Closeness:
    """``relative_norm`` is |A - B| / |A|; ``top1_agreement`` the share of tokens with the same likeliest successor.

    The divergences are KL(softmax A, softmax B) in nats a token.
    """

    tokens: int
    relative_norm: float
    max_difference: float
    top1_agreement: float
    mean_kl: float
    max_kl: float

    def within(self, rtol: float) -> bool:
        """Whether the relative norm is a number up to ``rtol``: NaN in the logits is never close."""
        return self.relative_norm <= rtol


def measure(a_TV: FloatArray, b_TV: FloatArray) -> Closeness:
    """B measured by A; both must have one shape."""
    if a_TV.shape != b_TV.shape:
        todo = "compare the same text and vocabulary"
        raise InputError(f"shapes {list(a_TV.shape)} and {list(b_TV.shape)}", "logits", todo)
    difference_TV = a_TV.astype(np.float64) - b_TV
    kl_T = _divergences(a_TV, b_TV)
    return Closeness(
        tokens=len(a_TV),
        relative_norm=_ratio(float(np.linalg.norm(difference_TV)), float(np.linalg.norm(a_TV.astype(np.float64)))),
        max_difference=float(np.abs(difference_TV).max()),
        top1_agreement=float(np.mean(a_TV.argmax(axis=1) == b_TV.argmax(axis=1))),
        mean_kl=float(kl_T.mean()),
        max_kl=float(kl_T.max()),
    )


def _ratio(difference: float, norm: float) -> float:
    """Infinite, or NaN, where A is all zeros and B is not."""
    if norm:
        return difference / norm
    return difference * math.inf if difference else 0.0


def _divergences(a_TV: FloatArray, b_TV: FloatArray) -> np.ndarray:
    log_a_TV, log_b_TV = _log_softmax(a_TV), _log_softmax(b_TV)
    kl_T = np.sum(np.exp(log_a_TV) * (log_a_TV - log_b_TV), axis=1)
    return np.maximum(kl_T, 0)  # rounding can leave it a little below


def _log_softmax(logits_TV: FloatArray) -> np.ndarray:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
