"""Many tokens' experts against dequantised products. Tolerance: 2^-8 relative norm (results are BF16).

Experts that nobody chose are NaN, codes and scales, so that touching one shows.
"""

import pytest
import torch

from deepspan.backends.torch_triton.kernels import grouped as kernel
from deepspan.backends.torch_triton.kernels import int8, quant
from deepspan.backends.torch_triton.kernels.chips import chip_named, chip_of
from deepspan.backends.torch_triton.kernels.few_rows import few_rows_eager
from deepspan.backends.torch_triton.kernels.pairs import gather, sort_pairs
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight
from deepspan.models.errors import DeepspanError
from tests.kernels.device import DEVICE
from tests.kernels.quantised import KINDS, distance, operand, weights
from tests.kernels.quantised import rows as rows_of
from tests.kernels.test_experts import EXPERTS, HIDDEN, WIDTH, choices, used

SMALL = kernel.Config(16, 64, 4, 2)


@pytest.mark.parametrize(
    "kind, quantised, config",
    [("fp8", True, None), ("fp8", False, None), ("fp8", False, SMALL)] + [(kind, True, SMALL) for kind in KINDS],
)
def test_equals_dequantised_products(kind, quantised, config):
    ids = choices(37, 4)
    pairs = sort_pairs(ids, EXPERTS, (config or kernel.choose(kernel.chip_of(ids.device))).block_m)
    weight = weights(kind, 2 * WIDTH, HIDDEN, EXPERTS, used(ids))
    x = torch.randn(37, HIDDEN).bfloat16()
    sorted_x = gather(operand(kind, x) if quantised else x, pairs, ids.shape[1])
    gate_up = kernel.grouped(sorted_x, weight, pairs, config=config)
    assert distance(gate_up, kernel.grouped_eager(sorted_x, weight, pairs, ids)) < 2**-8
    h = gate_up[:, :WIDTH]
    if quantised and kind == "fp8":
        h = quant.quantise(gate_up, gated=True)
    elif kind.startswith("int8"):
        h = int8.quantise_rows(gate_up, gated=True)
    factors = torch.rand(ids.shape)
    weight = weights(kind, HIDDEN, WIDTH, EXPERTS, used(ids))
    got = kernel.grouped(h, weight, pairs, factors, config=config)
    assert distance(got, kernel.grouped_eager(h, weight, pairs, ids, factors)) < 2**-8


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_one_matrix(kind):
    weight, x = weights(kind, 72, 168), operand(kind, rows_of(19, 168))
    got = kernel.one_matrix(x, weight, SMALL)
    assert distance(got, few_rows_eager(x, weight)) < 2**-8


def test_hopper_has_a_kernel_for_many_pairs_of_whole_fp8_blocks():
    hopper = chip_named("sm_90")
    stack = [weights("fp8", 256, 128, 4), weights("fp8", 128, 128, 4)]
    assert kernel.choose_for_experts(4 * kernel.HOPPER_PAIRS, stack, hopper) == kernel.HOPPER
    others = [(4 * kernel.HOPPER_PAIRS - 1, stack, hopper), (10**6, stack, chip_named("sm_100"))]
    others += [(10**6, [weights(kind, size, 128, 4), stack[1]], hopper) for kind, size in (("int8", 256), ("fp8", 200))]
    assert all(kernel.choose_for_experts(*other) != kernel.HOPPER for other in others)


@pytest.mark.skipif(chip_of(DEVICE).name != "sm_90", reason="Gluon has no interpreter: needs a Hopper GPU")
@pytest.mark.parametrize("scatter", [False, True])
def test_hopper_gives_the_same_bits(scatter):
    """Of each pair, wherever it lies among those of its expert."""
    ids = torch.randint(6, (3000, 4)).int()  # the stack has five: one expert is another rank's
    weight = Fp8Weight(*(part.contiguous() for part in weights("fp8", 384, 256, 5)))
    x = quant.quantise(torch.randn(3000, 256).bfloat16())
    factors = torch.rand(ids.shape) if scatter else None
    results = []
    for config in (kernel.choose(chip_of(DEVICE)), kernel.HOPPER):
        pairs = sort_pairs(ids, 5, config.block_m, foreign=True)
        out = kernel.grouped(gather(x, pairs, 4), weight, pairs, factors, config)
        out = out if scatter else out[pairs.pair_R.argsort()]
        results.append(out[ids.flatten() < 5])
    plain, hopper = results
    torch.testing.assert_close(hopper, plain, rtol=0, atol=0)


@pytest.mark.skipif(chip_of(DEVICE).name != "sm_90", reason="Gluon has no interpreter: needs a Hopper GPU")
@pytest.mark.parametrize("width, hidden", [(128, 256), (384, 128), (256, 7168)])
def test_hopper_joins_gate_and_up(width, hidden):
    """Experts of no pair, one, and about a tile; then pairs of other ranks, whose activations are NaN."""
    counts = torch.tensor([0, 1, 191, 192, 193, 0, 64, 65, 50])
    ids = torch.arange(len(counts)).repeat_interleave(counts).int()[torch.randperm(int(counts.sum()))]
    stack, foreign = len(counts) - 1, ids == len(counts) - 1
    codes, scales = weights("fp8", 2 * width, hidden, stack, used(ids, stack))
    weight = Fp8Weight(codes.contiguous(), scales.contiguous())
    x = quant.quantise(torch.randn(len(ids), hidden).bfloat16())
    x.codes.view(torch.uint8)[foreign] = 0x7F
    x.scales[foreign] = torch.nan
    pairs = sort_pairs(ids[:, None], stack, kernel.HOPPER.block_m, foreign=True)
    sorted_x = gather(x, pairs, 1)
    got = kernel.grouped(sorted_x, weight, pairs, config=kernel.HOPPER, gated=True)
    assert got.shape == (len(ids), width)
    expected = kernel.grouped_eager(sorted_x, weight, pairs, ids[:, None], gated=True)
    for expert in used(ids, stack):
        own_R = ids[pairs.pair_R.long()] == expert
        assert distance(got[own_R], expected[own_R]) < 2**-8


def test_only_that_kernel_takes_gated_products():
    ids = choices(9, 3)
    pairs = sort_pairs(ids, EXPERTS, SMALL.block_m)
    weight = weights("fp8", 2 * WIDTH, HIDDEN, EXPERTS, used(ids))
    with pytest.raises(DeepspanError, match="gated products"):
        kernel.grouped(torch.randn(27, HIDDEN).bfloat16(), weight, pairs, config=SMALL, gated=True)


def test_choices_of_other_ranks_are_not_run():
    ids = choices(9, 3)
    ids[2, 0], ids[5, 1] = -1, EXPERTS
    pairs = sort_pairs(ids, EXPERTS, SMALL.block_m, foreign=True)
    here = ((ids >= 0) & (ids < EXPERTS)).flatten()
    weight = weights("fp8", HIDDEN, WIDTH, EXPERTS, used(ids))
    h = torch.randn(27, WIDTH).bfloat16()
    factors = torch.rand(ids.shape)
    got = kernel.grouped(h, weight, pairs, factors, config=SMALL)
    assert distance(got[here], kernel.grouped_eager(h, weight, pairs, ids, factors)[here]) < 2**-8
