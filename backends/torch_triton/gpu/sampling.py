"""The next tokens, drawn on the device without asking the host; `models.sampling` is the definition.

Shape letters: O outputs, V vocabulary.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ...base import Sampling
from ..kernels.best import best
from ..sampling import filtered, gumbel_noise
from .inputs import SamplingNumbers

_UNSIGNED = 0xFFFFFFFF


class Draw(Enum):
    """How much of the sampler the sequences of a step need."""

    GREEDY = "greedy"
    RANDOM = "random"
    FILTERED = "filtered"


def draw_of(sampling: Sampling) -> Draw:
    """The least that gives every sequence its tokens."""
    random_B = sampling.temperature_B > 0
    if not random_B.any():
        return Draw.GREEDY
    filtered_B = random_B & ((sampling.top_k_B > 0) | (sampling.top_p_B < 1))
    return Draw.FILTERED if filtered_B.any() else Draw.RANDOM


def draw(logits_OV: Tensor, numbers: SamplingNumbers | None, how: Draw) -> Tensor:
    """int32 [O]: the best token of sequences at temperature 0, a drawn one of the others."""
    greedy_O = best(logits_OV)
    if how is Draw.GREEDY:
        return greedy_O
    assert numbers is not None, "drawing needs them"
    random_O = numbers.temperature_O > 0
    scaled_OV = logits_OV / numbers.temperature_O.where(random_O, 1.0)[:, None]
    if how is Draw.FILTERED:
        limited_O = (numbers.top_k_O > 0) | (numbers.top_p_O < 1)
        limited_OV = filtered(scaled_OV, numbers.top_k_O.long(), numbers.top_p_O)
        scaled_OV = torch.where(limited_O[:, None], limited_OV, scaled_OV)
    noise_OV = gumbel_noise(numbers.seed_O.long() & _UNSIGNED, numbers.position_O.long(), logits_OV.shape[1])
    return (scaled_OV + noise_OV).argmax(dim=1).int().where(random_O, greedy_O)
