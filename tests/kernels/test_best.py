"""The best token of each row is what argmax gives, ties included."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.best import best
from tests.kernels.device import seeded


@pytest.mark.parametrize("columns", [5, 129, 9000])
def test_is_the_first_of_the_largest(columns):
    generator = seeded(columns)
    logits = torch.randint(-4, 4, (3, columns + 3), generator=generator).float()[:, :columns]
    logits[1] = -torch.inf
    logits[2, -1] = 9
    assert best(logits).tolist() == logits.argmax(dim=1).tolist()
