"""Quantised layouts against slow loops that are written from the definitions, and against other libraries."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from deepspan.models import dtypes, quant, quantise

RNG = np.random.default_rng(7)


def weights(rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((rows, columns), np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded by torch, as bit patterns."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def slow_blocks(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    out = np.empty(values.shape, np.float32)
    for n in range(values.shape[0]):
        for k in range(values.shape[1]):
            out[n, k] = np.float32(values[n, k]) * scales[n // block[0], k // block[1]]
    return out


@pytest.mark.parametrize(("shape", "block"), [((576, 300), (128, 128)), ((1, 1), (128, 128)), ((70, 37), (16, 8))])
def test_fp8_blocks_equal_the_definition(shape: tuple[int, int], block: tuple[int, int]) -> None:
    codes = RNG.integers(0, 256, shape, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = np.exp(weights(*quant.block_grid(shape, block)))
    expected = slow_blocks(dtypes.F8_E4M3_VALUES[codes], scales, block)
    np.testing.assert_array_equal(quant.dequant_fp8_blocks(codes, scales, "f32", block), expected)
    np.testing.assert_array_equal(quant.dequant_fp8_blocks(codes, scales, "bf16", block), bf16(expected))


def test_kv_a_has_a_partial_last_block() -> None:
    assert quant.block_grid((576, 7168)) == (5, 56)
    codes, scales = quantise.quantise_fp8_blocks(weights(576, 256))
    assert scales.shape == (5, 2)
    with pytest.raises(AssertionError, match=r"scales \(4, 2\), blocks \(5, 2\)"):
        quant.dequant_fp8_blocks(codes, scales[:4], "f32")


@pytest.mark.parametrize("origin", [(0, 0), (128, 128), (5, 130), (127, 255), (300, 1)])
def test_unaligned_slices_use_absolute_blocks(origin: tuple[int, int]) -> None:
    codes, scales = quantise.quantise_fp8_blocks(weights(576, 300))
    whole = quant.dequant_fp8_blocks(codes, scales, "bf16")
    end = origin[0] + 140, origin[1] + 40
    touched = scales[origin[0] // 128 : -(-end[0] // 128), origin[1] // 128 : -(-end[1] // 128)]
    part = quant.dequant_fp8_blocks(codes[origin[0] : end[0], origin[1] : end[1]], touched, "bf16", origin=origin)
    np.testing.assert_array_equal(part, whole[origin[0] : end[0], origin[1] : end[1]])


def test_nan_codes_subnormals_and_huge_scales() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for scale in (2.0**-130, 1e-6, 1.0, 1e38, np.inf, np.nan):
        scales = np.full((1, 1), scale, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = dtypes.F8_E4M3_VALUES[codes] * scales
        got = quant.dequant_fp8_blocks(codes, scales, "bf16")
        nan = np.isnan(expected)
        np.testing.assert_array_equal(got[~nan], bf16(expected)[~nan])
        assert np.isnan(dtypes.bf16_to_f32(got[nan])).all()


def test_int8_blocks() -> None:
    weight = weights(200, 300)
    q, scales = quantise.quantise_int8_blocks(weight)
    assert q.dtype == np.int8 and q.min() == -127 and scales.shape == (2, 3)
    expected = slow_blocks(q.astype(np.float32), scales, (128, 128))
    np.testing.assert_array_equal(quant.dequant_int8_blocks(q, scales, "f32"), expected)
    np.testing.assert_array_equal(quant.dequant_int8_blocks(q, scales, "bf16"), bf16(expected))
    assert np.abs(expected - weight).max() <= scales.max() * 0.5001


def test_int8_channels() -> None:
    weight = weights(200, 300)
    weight[3] = 0
    q, scales = quantise.quantise_int8_channels(weight)
    np.testing.assert_array_equal(scales[4], np.abs(weight[4]).max() / np.float32(127))
    np.testing.assert_array_equal(q[5], np.rint(weight[5] / scales[5]))
    expected = q.astype(np.float32) * scales
    np.testing.assert_array_equal(quant.dequant_int8_channels(q, scales, "f32"), expected)
    np.testing.assert_array_equal(quant.dequant_int8_channels(q, scales, "bf16"), bf16(expected))
    offsets = np.full((200, 1), 3, np.float32)
    shifted = quant.dequant_int8_channels(q, scales, "f32", offsets)
    np.testing.assert_array_equal(shifted, (q.astype(np.float32) - 3) * scales)


def int4_weight(symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points [N, G], float16 scales [N, G] as FP32, and the weight by the slow definition."""
    weight = weights(24, 64) + (0 if symmetric else 0.5)
    codes, zeros, scales = quantise.quantise_int4_groups(weight, 16, symmetric)
    scales = scales.astype(np.float16).astype(np.float32)
    return codes, zeros, scales, slow_int4(codes, zeros, scales, np.arange(64) // 16)


def slow_int4(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    out = np.empty(codes.shape, np.float32)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = group_of[k]
            out[n, k] = np.float32(int(codes[n, k]) - int(zeros[n, g])) * scales[n, g]
    return out


def test_int4_round_trip_error() -> None:
    weight = weights(64, 512)
    for symmetric in (True, False):
        codes, zeros, scales = quantise.quantise_int4_groups(weight, 128, symmetric)
        back = slow_int4(codes, zeros, scales, np.arange(512) // 128)
        assert np.linalg.norm(back - weight) / np.linalg.norm(weight) < 0.14


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(v1: bool, act_order: bool, symmetric: bool) -> None:
    codes, zeros, scales, expected = int4_weight(symmetric)
    group_of = quant.groups(64, 16)
    if act_order:
        group_of = RNG.permutation(group_of).astype(np.int32)
        expected = slow_int4(codes, zeros, scales, group_of)
    qweight = quant.pack_int4(codes.T, axis=0)
    qzeros = quant.pack_int4((zeros.T - np.uint8(v1)) & 15, axis=1)
    assert qweight.shape == (8, 24) and qzeros.shape == (4, 3)
    if symmetric:
        assert (qzeros.view(np.uint32) == (0x77777777 if v1 else 0x88888888)).all()
    got = quant.dequant_gptq(qweight, qzeros, scales.T, group_of, v1, "f32")
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(quant.dequant_gptq(qweight, qzeros, scales.T, group_of, v1, "bf16"), bf16(expected))


def test_gptq_nibbles_run_along_the_input() -> None:
    word = np.array([[0x76543210]], np.int32)
    assert quant.unpack_int4(word, axis=0)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_v1_zero_point_zero_is_stored_as_fifteen() -> None:
    assert quant.unpack_gptq_zeros(np.array([[-1]], np.int32), True).tolist() == [[0] * 8]


def test_awq() -> None:
    codes, zeros, scales, expected = int4_weight(symmetric=False)
    qweight = quant.pack_int4(codes.T, 1, quant.AWQ_ORDER)
    qzeros = quant.pack_int4(zeros.T, 1, quant.AWQ_ORDER)
    assert qweight.shape == (64, 3)
    got = quant.dequant_awq(qweight, qzeros, scales.T, quant.groups(64, 16), "f32")
    np.testing.assert_array_equal(got, expected)


def test_awq_nibble_order() -> None:
    word = quant.pack_int4(np.arange(8, dtype=np.uint8)[None], 1, quant.AWQ_ORDER)
    assert word.view(np.uint32)[0, 0] == 0x75316420
    assert quant.unpack_int4(word, 1, quant.AWQ_ORDER).tolist() == [list(range(8))]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channels", [64, 60])
def test_packed_int4_is_compressed_tensors_layout(symmetric: bool, channels: int) -> None:
    codes, zeros, scales, expected = int4_weight(symmetric)
    codes, expected = codes[:, :channels], expected[:, :channels]
    signed = torch.from_numpy(codes.astype(np.int8) - 8)
    packed = pack_to_int32(signed, 4).numpy()
    np.testing.assert_array_equal(packed, quant.pack_int4(codes, axis=1))
    packed_zeros = None
    if not symmetric:
        packed_zeros = pack_to_int32(torch.from_numpy(zeros.astype(np.int8) - 8), 4, packed_dim=0).numpy()
        np.testing.assert_array_equal(packed_zeros, quant.pack_int4(zeros, axis=0))
    unpacked = unpack_from_int32(torch.from_numpy(packed), 4, torch.Size(codes.shape)).numpy()
    np.testing.assert_array_equal(unpacked + 8, quant.unpack_int4(packed, 1)[:, :channels])
    group_of = quant.groups(channels, 16)
    got = quant.dequant_packed_int4(packed, scales, group_of, "f32", packed_zeros)
    np.testing.assert_array_equal(got, expected)
