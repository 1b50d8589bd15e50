"""Number formats against torch's casts: every 8-bit code, every bfloat16 pattern, every rounding case."""

import numpy as np
import pytest
import torch

from deepspan.models import dtypes

ALL_8 = np.arange(256, dtype=np.uint8)
ALL_16 = np.arange(1 << 16, dtype=np.uint16)


def same(left: np.ndarray, right: np.ndarray) -> None:
    """Equal bit for bit, any NaN equal to any NaN."""
    assert left.dtype == right.dtype == np.float32
    nan = np.isnan(left)
    np.testing.assert_array_equal(nan, np.isnan(right))
    np.testing.assert_array_equal(left.view(np.uint32)[~nan], right.view(np.uint32)[~nan])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (dtypes.F8_E4M3_VALUES, torch.float8_e4m3fn),
        (dtypes.F8_E4M3FNUZ_VALUES, torch.float8_e4m3fnuz),
        (dtypes.F8_E5M2_VALUES, torch.float8_e5m2),
        (dtypes.F8_E8M0_VALUES, torch.float8_e8m0fnu),
    ],
)
def test_values_of_all_codes(values: np.ndarray, kind: torch.dtype) -> None:
    same(values, torch.from_numpy(ALL_8).view(kind).float().numpy())


def test_golden_codes() -> None:
    golden = {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x7E: 448.0, 0xB8: -1.0}
    for code, value in golden.items():
        assert dtypes.f8_e4m3_to_f32(np.uint8(code)) == value
    assert dtypes.f8_e8m0_to_f32(np.uint8(127)) == 1.0
    assert dtypes.f8_e8m0_to_f32(np.uint8(0)) == 2.0**-127
    assert dtypes.f8_e4m3fnuz_to_f32(np.uint8(0x38)) == 0.5


def test_bf16_patterns_round_trip() -> None:
    values = dtypes.bf16_to_f32(ALL_16)
    same(values, torch.from_numpy(ALL_16.view(np.int16)).view(torch.bfloat16).float().numpy())
    back = dtypes.f32_to_bf16(values)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(back[finite], ALL_16[finite])
    assert np.isnan(dtypes.bf16_to_f32(back[~finite])).all()


def around(bits: np.ndarray, lowest_kept: int) -> np.ndarray:
    """FP32 values whose discarded bits are zero, one above, just below, at and just above half, and all ones."""
    half = 1 << (lowest_kept - 1)
    tails = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint32)
    return ((bits.astype(np.uint32) << lowest_kept)[:, None] + tails).reshape(-1).view(np.float32)


def test_f32_to_bf16_rounds_to_nearest_even() -> None:
    values = around(ALL_16, 16)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    same(dtypes.bf16_to_f32(dtypes.f32_to_bf16(values)), expected)


def test_f32_to_bf16_takes_any_layout() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    same(dtypes.bf16_to_f32(dtypes.f32_to_bf16(values)), np.ascontiguousarray(values))


@pytest.mark.parametrize(
    ("cast", "values", "limit", "kind"),
    [
        (dtypes.f32_to_f8_e4m3, dtypes.F8_E4M3_VALUES, 448, torch.float8_e4m3fn),
        (dtypes.f32_to_f8_e4m3fnuz, dtypes.F8_E4M3FNUZ_VALUES, 240, torch.float8_e4m3fnuz),
    ],
)
def test_f32_to_f8_rounds_to_nearest_even(cast, values, limit, kind) -> None:
    """All of sign, exponent and the four leading mantissa bits (one more than is kept), with every kind of tail."""
    source = around(np.arange(1 << 13), 19)
    source = np.concatenate([source, around(np.arange(1 << 12), 20)])
    clamped = torch.from_numpy(source).clamp(-limit, limit)  # torch's cast overflows to NaN, ours saturates
    same(values[cast(source)], clamped.to(kind).float().numpy())


def test_every_midpoint_between_f8_codes() -> None:
    positive = dtypes.F8_E4M3_VALUES[:0x7F].astype(np.float64)
    middles = ((positive[:-1] + positive[1:]) / 2).astype(np.float32)
    for source in (middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))):
        np.testing.assert_array_equal(
            dtypes.f32_to_f8_e4m3(source), torch.from_numpy(source).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        )


def test_f8_saturation_and_specials() -> None:
    source = np.array([448, 464, 1e9, np.inf, -np.inf, np.nan, -0.0, 2.0**-10, 2.0**-11], np.float32)
    codes = [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80, 0x00, 0x00]
    assert dtypes.f32_to_f8_e4m3(source).tolist() == codes
    fnuz = [0x7F, 0x7F, 0x7F, 0x7F, 0xFF, 0x80, 0x00, 0x01, 0x00]
    assert dtypes.f32_to_f8_e4m3fnuz(source).tolist() == fnuz


def test_f8_codes_round_trip() -> None:
    for values, cast in (
        (dtypes.F8_E4M3_VALUES, dtypes.f32_to_f8_e4m3),
        (dtypes.F8_E4M3FNUZ_VALUES, dtypes.f32_to_f8_e4m3fnuz),
    ):
        finite = ~np.isnan(values)
        np.testing.assert_array_equal(cast(values)[finite], ALL_8[finite])


def test_names_are_those_of_the_format() -> None:
    names = {"F4", "F6_E2M3", "F6_E3M2"}
    assert {name for name, dtype in dtypes.DTYPES.items() if dtype.carrier is None} == names
    for dtype in dtypes.DTYPES.values():
        assert dtype.carrier is None or dtype.carrier.itemsize * 8 == dtype.bits
    assert set(dtypes.FLOATS) <= set(dtypes.DTYPES)


def test_to_f32_of_every_float() -> None:
    for name in dtypes.FLOATS:
        carrier = dtypes.DTYPES[name].carrier
        assert dtypes.to_f32(np.zeros((2, 3), carrier), name).dtype == np.float32
