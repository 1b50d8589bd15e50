"""Values of merged parts against the twin. Tolerance: relative norm 2^-8 (results are BF16); codes may be neighbours.

What a part that saw no token holds is NaN.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import values as kernel
from deepspan.backends.torch_triton.kernels.mla_decode import Attended
from deepspan.backends.torch_triton.kernels.quant import dequantise
from deepspan.models.errors import DeepspanError
from tests.kernels.device import seeded
from tests.kernels.quantised import distance
from tests.kernels.test_absorb import kv_b


def attended(tokens: int, heads: int, parts: int, latent: int) -> Attended:
    """Of the first token one part saw nothing, of the last none did: it is padding."""
    generator = seeded(parts)
    if parts == 1:
        return Attended(torch.randn(tokens, heads, latent, generator=generator).bfloat16(), None)
    part = torch.randn(tokens, heads, parts, latent, generator=generator)
    lse = torch.randn(tokens, heads, parts, generator=generator)
    unseen = torch.zeros(lse.shape, dtype=torch.bool)
    unseen[0, :, 1] = True
    if tokens > 1:
        unseen[-1] = True
    return Attended(part.masked_fill(unseen[..., None], float("nan")), lse.masked_fill(unseen, float("-inf")))


@pytest.mark.parametrize(
    "kind, heads, nope, value, latent",
    [("bf16", 3, 16, 24, 20), ("fp8", 2, 128, 128, 384), ("fp8", 3, 48, 24, 200), ("bf16", 1, 16, 24, 20)],
)
@pytest.mark.parametrize("tokens, parts", [(1, 1), (1, 18), (3, 2), (8, 5)])
def test_equals_its_twin(kind, heads, nope, value, latent, tokens, parts):
    weights, input_ = kv_b(kind, heads, nope + value, latent), attended(tokens, heads, parts, latent)
    want = kernel.values_eager(input_, weights, value)
    got = kernel.values(input_, weights, value)
    assert got.shape == (tokens, heads * value) and distance(got, want) < 2**-8
    assert parts == 1 or tokens == 1 or not got[-1].any()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_codes_are_those_of_the_bf16_results(ue8m0):
    weights, input_ = kv_b("fp8", 2, 256, 384), attended(5, 2, 3, 384)
    plain, codes = kernel.values(input_, weights, 128), kernel.values(input_, weights, 128, True, ue8m0)
    assert torch.equal(dequantise(codes), dequantise(kernel.quantise_eager(plain, ue8m0)))


def test_what_it_cannot_take():
    weights = kv_b("bf16", 2, 40, 32)
    with pytest.raises(DeepspanError, match="9 tokens: kernel values"):
        kernel.values(attended(9, 2, 2, 32), weights, 24)
    with pytest.raises(DeepspanError, match="codes of values of 24: kernel values"):
        kernel.values(attended(3, 2, 2, 32), weights, 24, quantise=True)
    with pytest.raises(DeepspanError, match="for 3 heads: kernel values"):
        kernel.values(attended(3, 3, 2, 32), weights, 24)
