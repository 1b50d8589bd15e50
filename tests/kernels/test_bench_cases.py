"""What `scripts/bench_kernels.py` times is what its twins compute: each kind of case, at small sizes."""

import pytest
import torch

from deepspan.scripts import kernel_cases
from deepspan.scripts.bench_kernels import GROUPS
from tests.kernels.device import DEVICE

SIZES = kernel_cases.Sizes(
    dense=[(192, 256)], gated=(256, 256), hidden=256, width=128, attention=[(1, 128, 16), (2, 64, 64)]
)
SETTING = kernel_cases.Setting(DEVICE, sweep=False, copies_of=0, experts=10, sizes=SIZES)
NAMES = {"few_rows", "few_rows gated", "experts.gate_up", "experts.down"}
KERNELS = {"int8": NAMES | {"experts.group"}, "int4": NAMES | {"experts.group"}, "fp8_cache": {"mla_decode"}}


@pytest.mark.parametrize("group", KERNELS)
def test_cases_of_each_format(group):
    torch.manual_seed(0)
    found = list(GROUPS[group](SETTING))
    assert {case.kernel for case in found} == KERNELS[group]
    for case in found:
        assert case.moved > 0 and len(case.runs) > 0
        if case.error and not case.shape.startswith(("T32", "T128")) and "M64" not in case.shape:
            assert case.error() < 0.02, case


def test_moved_bytes_are_those_of_codes_and_scales():
    """Of 192 x 256 weights and one row."""
    expected = {"int8": 192 * 256 + 4 * 192 + 256, "int4": 192 * (128 + 8) + 2 * 256}
    for group, size in expected.items():
        assert next(GROUPS[group](SETTING)).moved == size + 2 * 192
    attention = next(GROUPS["fp8_cache"](SETTING))
    assert attention.moved == 128 * 656 + 16 * (2 * 512 + 64) * 2
