"""Paged MLA decode against FP32 softmax. Tolerance: relative norm 2^-7 (weights and results are rounded to BF16).

Every cache slot that holds no visible token is NaN, and every table entry past a sequence's blocks is out of range.
"""

import pytest
import torch

from deepspan.backends.torch_triton.cache import FP8_CACHE, to_entries
from deepspan.backends.torch_triton.kernels import mla_decode as kernel
from deepspan.backends.torch_triton.kernels.chips import chip_named, chip_of
from deepspan.models.errors import DeepspanError
from tests.kernels.caches import DTYPES, poisoned
from tests.kernels.device import DEVICE, seeded


def case(lengths, page, heads, latent, rope, queries=1, seed=0, held=torch.bfloat16):
    generator = seeded(seed)
    needed = [-(-length // page) for length in lengths]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=generator).tolist()
    cache = poisoned(blocks, page, latent, rope, held)
    table = torch.full((len(lengths), max(needed) + 2), 2**31 - 1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(needed[b]):
            table[b, i] = order.pop()
            count = min(page, length - i * page)
            values = torch.randn(count, latent + rope, generator=generator) * (1 + i)
            cache[int(table[b, i]), :count] = to_entries(values, latent, held)
    q = torch.full((len(lengths) * queries, heads + 1, latent + rope + 3), torch.nan).bfloat16()
    q = q[:, :heads, : latent + rope]
    q[:] = torch.randn(q.shape, generator=generator)
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32)


def attended(*arguments, **options) -> torch.Tensor:
    """With its parts merged."""
    return kernel.merged(kernel.attend(*arguments, **options))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("heads, latent, rope", [(4, 512, 64), (20, 196, 16), (3, 20, 6)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("page", [64, 7])
def test_equals_softmax_attention(heads, latent, rope, queries, held, page):
    q, cache, table, lengths = case([5, 131, 0, 64], page, heads, latent, rope, queries, held=held)
    for parts in (1, 3):
        got = attended(q, cache, table, lengths, 0.1, latent, longest=200, parts=parts)
        want = kernel.attend_eager(q, cache, table, lengths, 0.1, latent)
        assert distance(got, want) < 2**-7
        assert not got[2 * queries : 3 * queries].any()


@pytest.mark.parametrize("held", DTYPES)
def test_large_tiles_and_large_scores(held):
    q, cache, table, lengths = case([1, 300], 64, 65, 64, 16, held=held)
    config = kernel.Config(64, 64, 8, 2)
    got = attended(q * 8, cache, table, lengths, 1.0, 64, longest=300, parts=2, config=config)
    assert distance(got, kernel.attend_eager(q * 8, cache, table, lengths, 1.0, 64)) < 2**-7


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("page", [64, 24])
def test_the_next_tile_may_wait_in_registers(held, page):
    """With parts that end within a tile, and empty ones."""
    q, cache, table, lengths = case([1, 131, 0, 64], page, 6, 132, 8, held=held)
    for parts in (1, 3):
        tiling = {"longest": 200, "parts": parts, "config": kernel.Config(16, 32, 8, 1, prefetch=True)}
        got = attended(q, cache, table, lengths, 0.1, 132, **tiling)
        assert distance(got, kernel.attend_eager(q, cache, table, lengths, 0.1, 132)) < 2**-7


@pytest.mark.parametrize("config", kernel.SHORT["sm_90"])
@pytest.mark.parametrize("heads, queries", [(20, 1), (6, 3)])
@pytest.mark.parametrize("page", [64, 24])
def test_every_tile_may_be_a_part(config, heads, queries, page):
    """Of the longest context; others leave parts empty."""
    q, cache, table, lengths = case([129, 1, 0, 64], page, heads, 132, 8, queries)
    parts = -(-129 // config.block_s)
    got = attended(q, cache, table, lengths, 0.1, 132, longest=129, parts=parts, config=config)
    assert distance(got, kernel.attend_eager(q, cache, table, lengths, 0.1, 132)) < 2**-7
    assert not got[2 * queries : 3 * queries].any()


@pytest.mark.parametrize(
    "batch, rows, longest, short, parts",
    [(1, 16, 1056, 0, 17), (1, 64, 1056, 0, 17), (7, 16, 1056, 0, 17), (4, 32, 1056, 1, 17), (8, 16, 1056, 1, 17),
     (1, 128, 1024, 0, 16), (1, 128, 1056, 1, 17), (1, 128, 2048, 1, 32)],
)  # fmt: skip
def test_hopper_takes_small_tiles_of_short_contexts(batch, rows, longest, short, parts):
    """Each a part; neither of FP8, nor where they do not fit the chip."""
    hopper = chip_named("sm_90")
    q, cache = torch.empty(batch, rows, 576).bfloat16(), torch.empty(9, 64, 576).bfloat16()
    config = kernel.choose(batch, rows, longest, q, cache, 512, hopper)
    assert config == kernel.SHORT["sm_90"][short]
    assert kernel.parts_for(batch, rows, longest, config, hopper) == parts
    others = [(batch, rows, 16 * longest, cache, hopper), (16 * batch, rows, longest, cache, hopper)]
    others += [(batch, rows, longest, torch.empty(9, 64, 656).to(FP8_CACHE), hopper)]
    others += [(batch, rows, longest, cache, chip_named("sm_100"))]
    for batch, rows, longest, cache, chip in others:
        tables = kernel.TABLE[chip.name], kernel.FP8_TABLE[chip.name], (kernel.HOPPER,)
        assert kernel.choose(batch, rows, longest, q, cache, 512, chip) in sum(tables, ())


def test_hopper_has_a_kernel_for_many_rows_of_contiguous_bf16():
    hopper = chip_named("sm_90")
    q, cache = torch.empty(2, 64, 576).bfloat16(), torch.empty(9, 64, 576).bfloat16()
    assert kernel.choose(2, 64, 9000, q, cache, 512, hopper) == kernel.HOPPER
    others = [(16, q, cache, 512, hopper), (64, q, cache, 512, chip_named("sm_100")), (64, q, cache, 500, hopper)]
    others += [(64, q[:, ::2], cache, 512, hopper), (64, q[..., :520], cache[..., :520], 512, hopper)]
    unfit = cache[:, :32], cache.flatten().view(-1, 32, 576), torch.empty(9, 64, 656).to(FP8_CACHE)
    others += [(64, q, cache, 512, hopper) for cache in unfit]
    assert all(kernel.choose(2, rows, 9000, *other) != kernel.HOPPER for rows, *other in others)


@pytest.mark.skipif(chip_of(DEVICE).name != "sm_90", reason="Gluon has no interpreter: needs a Hopper GPU")
@pytest.mark.parametrize("heads, queries", [(128, 1), (64, 2), (40, 3), (33, 1), (17, 1)])
@pytest.mark.parametrize("page", [64, 128])
def test_hopper_equals_softmax_attention(heads, queries, page):
    """Tiles that end within a sequence's rows and beyond all rows, and tokens, inside NaN."""
    lengths = [1, 63, 64, 65, 127, 128, 129, 0, 200, 1000, 777]
    q, cache, table, lengths = case(lengths, page, heads, 512, 64, queries)
    q, cache = q.contiguous(), cache.contiguous()
    want = kernel.attend_eager(q, cache, table, lengths, 0.1, 512)
    for parts in (1, 3, 8):
        got = attended(q, cache, table, lengths, 0.1, 512, longest=1000, parts=parts, config=kernel.HOPPER)
        assert distance(got, want) < 2**-7
        assert not got[7 * queries : 8 * queries].any()


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_fp8_entries_are_read_alike_without_an_instruction(name, monkeypatch):
    q, cache, table, lengths = case([70, 9], 16, 4, 132, 8, held=FP8_CACHE)
    tiling = {"longest": 80, "parts": 2, "config": kernel.Config(16, 32, 4, 1)}
    with_one = attended(q, cache, table, lengths, 0.1, 132, **tiling)
    monkeypatch.setattr(kernel, "chip_of", lambda device: chip_named(name))
    assert torch.equal(attended(q, cache, table, lengths, 0.1, 132, **tiling), with_one)


def test_parts_are_a_matter_of_speed():
    q, cache, table, lengths = case([700], 64, 4, 32, 16)
    results = [attended(q, cache, table, lengths, 0.2, 32, 700, parts=parts) for parts in (1, 2, 8, 32)]
    for other in results[1:]:
        assert distance(other, results[0]) < 2**-7


def test_what_it_cannot_take_is_one_clear_error():
    q, cache, table, lengths = case([9], 16, 4, 32, 16)
    with pytest.raises(DeepspanError, match="cache .*, not of 48: kernel mla_decode"):
        attended(q, cache[:, :, :40], table, lengths, 1.0, 32, 9)
    _, in_fp8, *_ = case([9], 16, 4, 32, 16, held=FP8_CACHE)
    misaligned = torch.cat([in_fp8, in_fp8[..., :2]], -1)[..., :-2]
    with pytest.raises(DeepspanError, match=r"FP8 cache of latents of 32 with strides .*1120, 70, 1"):
        attended(q, misaligned, table, lengths, 1.0, 32, 9)
    with pytest.raises(DeepspanError, match="must be int32"):
        attended(q, cache, table.long(), lengths, 1.0, 32, 9)
