"""Rotary position embedding tables with YaRN, as pure functions of the spec (float64 inside, float32 tables out).

Source: YaRN (arXiv 2309.00071) as DeepSeek-V2/V3 use it: a frequency is kept where its wavelength is short against the
original context, divided by ``factor`` where it is long, and mixed linearly in between; attention is sharpened by
``m(factor, mscale_all_dim)`` squared in the softmax scale.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .spec import ModelSpec, Yarn


def yarn_magnitude(factor: float, mscale: float) -> float:
    """m(f, s) = 0.1 s ln f + 1 for f > 1, else 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(spec: ModelSpec) -> NDArray[np.float64]:
    """Radians per position for each rotated pair, float64 [qk_rope_head_dim / 2]."""
    half = spec.qk_rope_head_dim // 2
    extrapolated = spec.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if spec.yarn is None:
        return extrapolated
    low, high = _correction_range(spec.yarn, spec.rope_theta, spec.qk_rope_head_dim)
    width = (high - low) or 0.001  # one boundary for both betas: an (almost) hard step
    ramp = np.clip((np.arange(half) - low) / width, 0.0, 1.0)
    return extrapolated / spec.yarn.factor * ramp + extrapolated * (1.0 - ramp)


def _correction_range(yarn: Yarn, theta: float, dim: int) -> tuple[int, int]:
    """The pair indices between which frequencies go from kept to divided."""

    def pair_index(rotations: float) -> float:
        """The pair that turns ``rotations`` times over the original context."""
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(theta))

    return max(math.floor(pair_index(yarn.beta_fast)), 0), min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)


def rope_magnitude(spec: ModelSpec) -> float:
    """What cosines and sines are multiplied by: 1 for every released checkpoint."""
    if spec.yarn is None:
        return 1.0
    yarn = spec.yarn
    return yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(spec: ModelSpec) -> float:
    """(d_nope + d_rope)^-1/2, times m(factor, mscale_all_dim)^2 under YaRN."""
    scale = spec.qk_head_dim**-0.5
    if spec.yarn is not None:
        scale *= yarn_magnitude(spec.yarn.factor, spec.yarn.mscale_all_dim) ** 2
    return scale


def rope_tables(spec: ModelSpec, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of positions 0 … length - 1, each float32 [length, qk_rope_head_dim / 2]."""
    angles = np.arange(length, dtype=np.float64)[:, None] * rope_frequencies(spec)[None, :]
    magnitude = rope_magnitude(spec)
    return (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)
