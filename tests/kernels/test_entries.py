"""Entries read from the cache against the twin, bit for bit; whatever is not read is NaN."""

import pytest
import torch

from deepspan.backends.torch_triton.cache import FP8_CACHE, to_entries
from deepspan.backends.torch_triton.kernels import entries as kernel
from deepspan.backends.torch_triton.kernels.chips import chip_named
from deepspan.models.errors import DeepspanError
from tests.kernels.caches import DTYPES, poisoned
from tests.kernels.device import seeded


@pytest.mark.parametrize("latent, rope", [(512, 64), (132, 6)])
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_equals_its_twin(latent, rope, held, slot_type):
    cache = poisoned(5, 7, latent, rope, held)
    slots = torch.randperm(35, generator=seeded(0))[:21].to(slot_type)
    drawn = torch.randn(21, latent + rope, generator=seeded(1)) * torch.logspace(-4, 3, 21)[:, None]
    drawn[3] = 0
    cache[slots.long() // 7, slots.long() % 7] = to_entries(drawn, latent, held)
    want = kernel.read_entries_eager(cache, slots, latent, rope)
    assert want.isfinite().all()
    assert torch.equal(kernel.read_entries(cache, slots, latent, rope), want)


def test_every_code_is_read_alike_with_and_without_an_instruction(monkeypatch):
    cache = torch.zeros(1, 2, 256 + 8 + 4, dtype=FP8_CACHE)
    cache[0, 0, :256] = torch.arange(256)
    cache[0, :, 256:264] = torch.tensor([2.0**-9, 0.37]).view(torch.uint8)  # of whoever writes other scales
    slots = torch.arange(2)
    with_one = kernel.read_entries(cache, slots, 256, 2)
    monkeypatch.setattr(kernel, "chip_of", lambda device: chip_named("gfx942"))
    without = kernel.read_entries(cache, slots, 256, 2)
    nan = without.isnan()
    assert torch.equal(nan.nonzero(), torch.tensor([[0, 127], [0, 255]]))
    assert torch.equal(without[~nan], with_one[~nan])  # Triton's interpreter reads NaN codes as 480
    exact = kernel.read_entries_eager(cache, slots, 256, 2)
    torch.testing.assert_close(without[:, :128], exact[:, :128], rtol=0, atol=0, equal_nan=True)


def test_other_caches_are_refused():
    slots = torch.arange(2)
    with pytest.raises(DeepspanError, match=r"cache \(1, 4, 48\), not of 68: kernel read_entries"):
        kernel.read_entries(torch.zeros(1, 4, 48, dtype=FP8_CACHE), slots, 32, 16)
    with pytest.raises(DeepspanError, match="cache in torch.float32"):
        kernel.read_entries(torch.zeros(1, 4, 48), slots, 32, 16)
