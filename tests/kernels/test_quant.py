"""Activation quantisation, bit by bit against its eager twins and the neutral definition."""

import itertools

import numpy as np
import pytest
import torch

from deepspan.backends.torch_triton.kernels import int8, quant
from deepspan.models.quantise import quantise_activation_fp8, quantise_activation_int8
from tests.kernels.device import seeded
from tests.kernels.rows import bits, poisoned


def activations(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, with a zero group and values below e4m3's normal range."""
    generator = seeded(seed)
    x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-4, 4, tokens)[:, None]
    x[0, : min(128, channels)] = 0
    x[-1, 1::3] *= 2.0**-9
    return x


@pytest.mark.parametrize("tokens, channels", [(1, 128), (3, 36), (5, 1408), (2, 7168)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantise_is_bit_equal_to_its_twin_and_to_the_definition(tokens, channels, dtype, ue8m0):
    x = activations(tokens, channels).to(dtype)
    got = quant.quantise(poisoned(x), ue8m0)
    twin = quant.quantise_eager(x, ue8m0)
    codes, scales = quantise_activation_fp8(x.float().numpy(force=True), ue8m0=ue8m0)
    for other_codes, other_scales in ((twin.codes, twin.scales.numpy(force=True)), (torch.tensor(codes), scales)):
        np.testing.assert_array_equal(bits(got.codes), bits(other_codes))
        np.testing.assert_array_equal(got.scales.numpy(force=True), other_scales)


def test_many_numbers_have_the_codes_of_few(monkeypatch):
    x = poisoned(activations(3, 5000))
    few = quant.quantise(x)
    monkeypatch.setattr(quant, "MANY", x.numel())
    many = quant.quantise(x)
    np.testing.assert_array_equal(bits(many.codes), bits(few.codes))
    assert torch.equal(many.scales, few.scales)


@pytest.mark.parametrize("tokens, channels", [(1, 128), (3, 36), (2, 9000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_rows_are_bit_equal_to_their_twin_and_to_the_definition(tokens, channels, dtype):
    x = activations(tokens, channels).to(dtype)
    x[-1] = x[-1].abs().max() * (torch.arange(channels) % 255 - 127) / 127  # ties, among others
    got, twin = int8.quantise_rows(poisoned(x)), quant.quantise_rows_eager(x)
    codes, scales = quantise_activation_int8(x.float().numpy(force=True))
    for other_codes, other_scales in ((twin.codes.numpy(force=True), twin.scales.numpy(force=True)), (codes, scales)):
        np.testing.assert_array_equal(got.codes.numpy(force=True), other_codes)
        np.testing.assert_array_equal(got.scales.numpy(force=True), other_scales)


def test_rows_from_a_number_on_are_not_read(tokens=6, channels=264):
    x = activations(tokens, channels)
    x[4:] = torch.nan
    rows = torch.tensor([4], dtype=torch.int32)
    for quantise, gated in itertools.product((quant.quantise, int8.quantise_rows), (False, True)):
        some, all_of_four = quantise(x, gated=gated, rows_1=rows), quantise(x[:4], gated=gated)
        np.testing.assert_array_equal(bits(some.codes[:4]), bits(all_of_four.codes))
        assert torch.equal(some.scales[:4], all_of_four.scales)


def test_int8_rows_of_gate_and_up():
    x = torch.randn(5, 2 * 320).bfloat16()
    got, twin = int8.quantise_rows(poisoned(x), gated=True), quant.quantise_rows_eager(x, gated=True)
    torch.testing.assert_close(got.scales, twin.scales, rtol=2**-7, atol=0)
    assert (got.codes.int() - twin.codes.int()).abs().max() <= 1


def test_gate_and_up_are_joined_before_they_are_quantised():
    x = torch.randn(5, 2 * 320).bfloat16()
    got, twin = quant.quantise(poisoned(x), gated=True), quant.quantise_eager(x, gated=True)
    gate, up = x.float().chunk(2, dim=1)
    torch.testing.assert_close(quant.dequantise(got), torch.nn.functional.silu(gate) * up, rtol=2**-4, atol=1e-2)
    assert (quant.dequantise(got) - quant.dequantise(twin)).abs().max() <= 2**-3 * quant.dequantise(twin).abs().max()


def test_every_rounding_boundary_of_e4m3():
    """All codes, all midpoints and their FP32 neighbours, with scale 1 (absmax 448)."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    edges = torch.cat([codes, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])
    values = torch.cat([edges, -edges])
    groups = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([groups, torch.full((len(groups), 1), 448.0)], 1)
    got = quant.quantise(x)
    assert (got.scales == 1).all()
    np.testing.assert_array_equal(bits(got.codes), bits(x.to(torch.float8_e4m3fn)))


def test_nan_stays_nan():
    x = torch.randn(2, 256)
    x[1, 7] = torch.nan
    values = quant.dequantise(quant.quantise(x))
    assert values[1, :128].isnan().any()
    assert values[0].isfinite().all()
    assert values[1, 128:].isfinite().all()
