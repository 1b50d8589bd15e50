"""YaRN frequencies and softmax scales against published vectors (float64)."""

import numpy as np
import pytest

from deepspan.models.catalog import load_spec
from deepspan.models.rope import rope_frequencies, rope_magnitude, rope_tables, softmax_scale

PAIRS = [0, 1, 10, 11, 16, 19, 20, 22, 23, 31]
# One row a model: theta 1e4, factor 40; theta 5e4, factor 32; theta 5e4, factor 64.
VECTORS = {
    "deepseek_v3": [
        1.0, 7.49894209e-1, 5.62341325e-2, 3.90069266e-2, 5.5e-3, 1.37051364e-3, 7.90569415e-4, 1.77827941e-4,
        3.33380358e-5, 3.33380358e-6,
    ],
    "kimi_k2": [
        1.0, 7.13111085e-1, 3.40072782e-2, 2.42509670e-2, 4.47213595e-3, 1.62175991e-3, 3.61404677e-5, 1.83784188e-5,
        1.31058542e-5, 8.76441291e-7,
    ],
    "kimi_k2_0905": [
        1.0, 7.13111085e-1, 3.40072782e-2, 2.42509670e-2, 4.47213595e-3, 1.62175991e-3, 1.80702339e-5, 9.18920940e-6,
        6.55292708e-6, 4.38220646e-7,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_frequencies(name):
    np.testing.assert_allclose(rope_frequencies(load_spec(name))[PAIRS], VECTORS[name], rtol=5e-9)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek_v3", 0.1352338),
        ("deepseek_v2", 0.1352338),
        ("deepseek_v2_lite", 0.1147214),
        ("kimi_k2", 0.1308608),
        ("kimi_k2_0905", 0.1446796),
        ("moonlight_16b_a3b", 0.0721688),
    ],
)
def test_softmax_scale(name, scale):
    assert softmax_scale(load_spec(name)) == pytest.approx(scale, abs=5e-8)


def test_tables_are_float32_of_float64_angles():
    spec = load_spec("deepseek_v3")
    cos, sin = rope_tables(spec, 50_001)
    assert cos.dtype == sin.dtype == np.float32
    angle = 50_000 * rope_frequencies(spec)
    np.testing.assert_array_equal(cos[50_000], np.cos(angle).astype(np.float32))
    np.testing.assert_array_equal(sin[50_000], np.sin(angle).astype(np.float32))


def test_magnitude_follows_the_two_mscales():
    spec = load_spec("deepseek_v3")
    assert rope_magnitude(spec) == 1.0
    lone = spec.replace({"yarn": {"factor": 40.0, "original_max_position_embeddings": 4096}})
    assert rope_magnitude(lone) == pytest.approx(0.1 * np.log(40) + 1)
