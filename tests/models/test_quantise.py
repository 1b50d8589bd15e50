"""Quantisers against the definitions, torch's casts and compressed-tensors' own arithmetic."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams

from deepspan.models import dtypes, quant, quantise

RNG = np.random.default_rng(11)


def weights(rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((rows, columns), np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded by torch, as bit patterns."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def heavy_tailed(rows: int, columns: int) -> np.ndarray:
    """BF16 patterns of weights with outliers, zero rows, denormals and rows of one value."""
    values = RNG.standard_t(3, (rows, columns)).astype(np.float32) * np.exp(weights(rows, 1) * 4)
    values[0] = 0
    values[1] = 1e-39 * values[1]
    values[2] = 3e-3
    values[3, 1:] = 0
    return bf16(values)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_quantisation(ue8m0: bool) -> None:
    weight = weights(576, 300)
    weight[:128, :128] = 0
    weight[130, 140] = 100.0
    codes, scales = quantise.quantise_fp8_blocks(weight, ue8m0=ue8m0)
    for r in range(5):
        for c in range(3):
            part = weight[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            scale = np.abs(part).max() / np.float32(448) if part.any() else np.float32(1)
            scale = np.float32(2.0 ** np.ceil(np.log2(scale))) if ue8m0 else scale
            assert scales[r, c] == scale
            expected = torch.from_numpy(part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
            np.testing.assert_array_equal(codes[128 * r : 128 * r + 128, 128 * c : 128 * c + 128], expected.numpy())
    error = quant.dequant_fp8_blocks(codes, scales, "f32") - weight
    assert np.linalg.norm(error) / np.linalg.norm(weight) < 0.04


def test_power_of_two_above_is_exact() -> None:
    exponents = np.arange(-126, 127)
    powers = np.ldexp(np.float32(1), exponents)
    np.testing.assert_array_equal(quantise.power_of_two_above(powers), powers)
    np.testing.assert_array_equal(quantise.power_of_two_above(np.nextafter(powers, np.float32(np.inf))), 2 * powers)
    np.testing.assert_array_equal(quantise.power_of_two_above(np.nextafter(powers[1:], np.float32(0))), powers[1:])


def test_tiny_weights_keep_finite_codes() -> None:
    weight = np.full((4, 4), 1e-44, np.float32)
    codes, scales = quantise.quantise_fp8_blocks(weight)
    assert np.isfinite(quant.dequant_fp8_blocks(codes, scales, "f32")).all()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_activations(ue8m0: bool) -> None:
    x = np.stack([weights(3, 300), np.zeros((3, 300), np.float32)])
    codes, scales = quantise.quantise_activation_fp8(x, ue8m0=ue8m0)
    assert codes.shape == x.shape and scales.shape == (2, 3, 3)
    for index in np.ndindex(2, 3, 3):
        part = x[index[:2]][128 * index[2] : 128 * index[2] + 128]
        scale = max(np.abs(part).max(), np.float32(1e-4)) / np.float32(448)
        assert scales[index] == (np.float32(2.0 ** np.ceil(np.log2(scale))) if ue8m0 else scale)
    back = dtypes.F8_E4M3_VALUES[codes] * np.repeat(scales, 128, -1)[..., :300]
    assert np.linalg.norm(back - x) / np.linalg.norm(x) < 0.04


@pytest.mark.parametrize(("group", "count"), [(None, 1), (128, 3)])
def test_int8_activations(group: int | None, count: int) -> None:
    x = weights(5, 300)
    q, scales = quantise.quantise_activation_int8(x, group)
    assert scales.shape == (5, count)
    back = q * np.repeat(scales, group or 300, axis=-1)[:, :300]
    assert np.abs(back - x).max() <= scales.max() * 0.5001


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(576, 300), (1, 1), (130, 4000)])
def test_fp8_of_bf16_is_fp8_of_its_values(shape: tuple[int, int], ue8m0: bool) -> None:
    bits = bf16(weights(*shape))
    codes, scales = quantise.quantise_fp8_blocks(bits, ue8m0=ue8m0)
    expected_codes, expected_scales = quantise.quantise_fp8_blocks(dtypes.bf16_to_f32(bits), ue8m0=ue8m0)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("shape", [(5, 7), (40, 3000), (300, 64), (9, 70_000)])
def test_int8_channels_by_the_definition(shape: tuple[int, int]) -> None:
    bits = heavy_tailed(*shape)
    values = dtypes.bf16_to_f32(bits)
    q, scales = quantise.quantise_int8_channels(bits)
    assert scales.dtype == np.float32 and scales.shape == (shape[0], 1)
    for row, scale, codes in zip(values, scales[:, 0], q, strict=True):
        if not row.any():
            assert scale == 1 and not codes.any()
        elif np.abs(row).max() > 1e-30:
            assert scale == np.abs(row).max() / np.float32(127)
            np.testing.assert_array_equal(codes, np.round(row / scale).astype(int))
            assert np.abs(codes.astype(int)).max() == 127


def test_int8_channels_with_bf16_scales_use_the_stored_scale() -> None:
    values = dtypes.bf16_to_f32(heavy_tailed(64, 500))
    q, scales = quantise.quantise_int8_channels(values, bf16_scales=True)
    np.testing.assert_array_equal(dtypes.bf16_to_f32(bf16(scales)), scales)
    np.testing.assert_array_equal(q[4:], np.clip(np.round(values[4:] / scales[4:]), -127, 127))


def compressed_tensors_int8(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales as the library itself makes them from BF16 weights."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    weight = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressed = BaseCompressor.get_value_from_registry("int-quantized").compress(state, scheme)
    assert compressed.keys() == {"weight", "weight_scale"}
    assert compressed["weight_scale"].dtype == torch.bfloat16
    return compressed["weight"].numpy(), compressed["weight_scale"].view(torch.uint16).numpy()


@pytest.mark.parametrize("shape", [(5, 7), (200, 3000), (300, 64), (9, 70_000)])
def test_int8_equals_compressed_tensors(shape: tuple[int, int]) -> None:
    bits = heavy_tailed(*shape)
    q, scales = quantise.quantise_int8_compressed_tensors(bits)
    expected_q, expected_scales = compressed_tensors_int8(bits)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(q, expected_q)


def test_int8_equals_compressed_tensors_for_every_bf16_quotient() -> None:
    """All positive BF16 values against one maximum: every rounding case of the quotient, ties included."""
    for maximum in (1.0, 0.00317, 117.5):
        bits = np.arange(0x7F80, dtype=np.uint16)
        bits = bits[dtypes.bf16_to_f32(bits) <= maximum]
        bits = np.concatenate([bits, bits[1:] | 0x8000])[None]
        for got, expected in zip(
            quantise.quantise_int8_compressed_tensors(bits), compressed_tensors_int8(bits), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


def test_expected_errors() -> None:
    """Relative RMS errors of Gaussian rows, as far apart as number formats are: a wrong scale shows at once."""
    bits = bf16(weights(256, 2048))
    exact = dtypes.bf16_to_f32(bits)

    def error(values: np.ndarray) -> float:
        return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))

    q, scales = quantise.quantise_int8_channels(bits)
    assert 0.007 < error(quant.dequant_int8_channels(q, scales, "f32")) < 0.011
    q, patterns = quantise.quantise_int8_compressed_tensors(bits)
    assert 0.007 < error(quant.dequant_int8_channels(q, dtypes.bf16_to_f32(patterns), "f32")) < 0.013
    codes, block_scales = quantise.quantise_fp8_blocks(bits)
    assert 0.024 < error(quant.dequant_fp8_blocks(codes, block_scales, "f32")) < 0.028


@pytest.mark.parametrize("offset", [0, -128, 37])
def test_static_companions_give_the_layer(offset: int) -> None:
    """(x_q @ q.T + quant_bias) * deq_scale is the layer on the dequantised input and weight."""
    q, scales = quantise.quantise_int8_channels(weights(50, 333))
    input_scale = 0.0625
    deq_scale, quant_bias = quantise.static_int8_companions(q, scales, input_scale, offset)
    assert deq_scale.dtype == np.float32 and quant_bias.dtype == np.int32
    x_q = RNG.integers(-128, 128, (4, 333))
    output = (x_q @ q.astype(np.int64).T + quant_bias) * deq_scale.astype(np.float64)
    x, weight = (x_q - offset) * input_scale, q * scales.astype(np.float64)
    np.testing.assert_allclose(output, x @ weight.T, rtol=1e-6, atol=1e-6)
