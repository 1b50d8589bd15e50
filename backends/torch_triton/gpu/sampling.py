"""The next tokens, drawn on the device without asking the host; `models.sampling` is the definition.

Shape letters: O outputs, P columns of the vocabulary.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ...base import Sampling
from ..kernels.best import Copies
from ..sampling import filtered, gumbel_noise
from .inputs import SamplingNumbers
from .logits import Logits

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


def draw(
    logits: Logits,
    numbers: SamplingNumbers | None,
    how: Draw,
    out_O: Tensor | None = None,
    copies: Copies | None = None,
) -> Tensor:
    """int32 [O]: the best token of sequences at temperature 0, a drawn one of the others; see `kernels.best`.

    Filters look at the whole vocabulary; otherwise ranks draw in their parts of it.
    """
    if how is Draw.GREEDY:
        return logits.best(out_O, copies)
    assert numbers is not None, "drawing needs them"
    if how is Draw.FILTERED:
        logits = logits.joined()
    logits_OP = logits.part_OP
    random_O1 = (numbers.temperature_O > 0)[:, None]
    scaled_OP = logits_OP / numbers.temperature_O[:, None].where(random_O1, 1.0)
    if how is Draw.FILTERED:
        limited_O = (numbers.top_k_O > 0) | (numbers.top_p_O < 1)
        limited_OP = filtered(scaled_OP, numbers.top_k_O.long(), numbers.top_p_O)
        scaled_OP = torch.where(limited_O[:, None], limited_OP, scaled_OP)
    seed_O, columns = numbers.seed_O.long() & _UNSIGNED, range(logits.first, logits.first + logits_OP.shape[1])
    scaled_OP += gumbel_noise(seed_O, numbers.position_O.long(), columns)
    return logits._replace(part_OP=torch.where(random_O1, scaled_OP, logits_OP)).best(out_O, copies)
