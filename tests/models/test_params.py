"""The parameter table must reproduce the published models exactly."""

import math
from collections import Counter

import pytest

from deepspan.models.catalog import load_spec, spec_names
from deepspan.models.params import (
    active_parameters,
    kv_bytes_per_token,
    mtp_parameter_count,
    parameters,
    stored_tensors,
    total_parameters,
)

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@pytest.mark.parametrize(
    ("name", "total", "active", "kv_bytes"),
    [
        ("deepseek_v3", 671_026_419_200, 37_552_297_472, 70_272),
        ("deepseek_r1", 671_026_419_200, 37_552_297_472, 70_272),
        ("deepseek_v2", 235_741_434_880, 21_375_800_320, 69_120),
        ("deepseek_v2_lite", 15_706_484_224, 2_661_150_208, 31_104),
        ("kimi_k2", 1_026_408_232_448, 32_861_500_928, 70_272),
        ("moonlight_16b_a3b", 15_960_110_208, 2_914_776_192, 31_104),
    ],
)
def test_published_parameter_counts(name, total, active, kv_bytes):
    spec = load_spec(name)
    assert (total_parameters(spec), active_parameters(spec), kv_bytes_per_token(spec)) == (total, active, kv_bytes)


def test_v3_2_adds_the_indexer():
    assert total_parameters(load_spec("deepseek_v3_2")) == 671_877_944_064


def test_published_v3_checkpoint_map():
    tensors = list(stored_tensors(load_spec("deepseek_v3")))
    assert Counter(tensor.dtype for tensor in tensors) == {"F8_E4M3": 45_808, "F32": 45_867, "BF16": 316}
    assert sum(math.prod(tensor.shape) * BYTES[tensor.dtype] for tensor in tensors) == 688_574_839_360
    by_name = {tensor.name: tensor for tensor in tensors}
    assert len(by_name) == 91_991
    # 576 rows are four and a half blocks of 128.
    assert by_name["model.layers.7.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert by_name["model.layers.61.eh_proj.weight"].shape == (7168, 14336)


def test_v3_mtp_layer():
    spec = load_spec("deepseek_v3")
    assert mtp_parameter_count(spec) == 13_463_426_304
    mtp_tensors = [tensor for tensor in stored_tensors(spec) if tensor.name.startswith("model.layers.61.")]
    assert len(mtp_tensors) == 1_564


@pytest.mark.parametrize("name", spec_names())
def test_every_shipped_spec_has_unique_names_and_one_axis_per_dimension(name):
    params = list(parameters(load_spec(name)))
    assert len({param.name for param in params}) == len(params)
    assert all(len(param.axes) == len(param.shape) for param in params)
