"""INT4 matrices in BF16 are the dequantised ones, rounded; what is around the operands is poison."""

import pytest
import torch

from deepspan.backends.torch_triton.kernels.decoded import decoded
from deepspan.backends.torch_triton.kernels.weights import dequantise_weight
from tests.kernels.quantised import KINDS, weights


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int4")])
@pytest.mark.parametrize("outputs, inputs", [(200, 512), (5, 40)])
def test_is_the_dequantised_matrix(kind, outputs, inputs):
    weight = weights(kind, outputs, inputs)
    torch.testing.assert_close(decoded(weight), dequantise_weight(weight).bfloat16(), rtol=0, atol=0)
