"""Shares of weights: every processor gets as many programs, and no more fit beside them."""

import pytest

from deepspan.backends.torch_triton.kernels.chips import chip_named
from deepspan.backends.torch_triton.kernels.shares import even_share, gated_share
from deepspan.backends.torch_triton.kernels.sizes import cdiv, power_of_2

HOPPER = chip_named("sm_90")


@pytest.mark.parametrize(
    "width, matrices, programs", [(2048, 9, 3), (1024, 9, 3), (512, 9, 1), (18432, 1, 3), (9216, 1, 3), (4608, 1, 1)]
)
def test_gated_tiles_of_v3_fill_the_chip_once(width, matrices, programs):
    """V3's experts and dense layer, whole, in halves and in quarters."""
    rows, stages = gated_share(width, matrices, 16, HOPPER)
    launched, room = matrices * cdiv(width, rows), programs * HOPPER.processors
    assert 0.95 * room < launched <= room
    shared = stages * (2 * power_of_2(rows) + 16) * 128
    assert programs * shared <= HOPPER.shared_memory < (programs + 1) * shared


def test_what_has_no_even_share():
    assert gated_share(256, 9, 16, HOPPER) is None
    assert even_share(100, 2, 64) == 50
    assert even_share(100, 4, 64) is None
    assert even_share(100, 1, 64) is None
