"""Parts of the GPU's path that need no forward pass: quantised weights, pairs in tiles, sampling, memory."""

import numpy as np
import pytest
import torch

from deepspan.backends.base import Sampling
from deepspan.backends.torch_triton.gpu import graphs, room
from deepspan.backends.torch_triton.gpu.formats import Fp8Format
from deepspan.backends.torch_triton.gpu.inputs import SamplingNumbers
from deepspan.backends.torch_triton.gpu.logits import Logits
from deepspan.backends.torch_triton.gpu.matrices import pad_fp8, quantise_blocks
from deepspan.backends.torch_triton.gpu.sampling import Draw, draw, draw_of
from deepspan.backends.torch_triton.gpu.source import DrawnTensors, StoredTensors
from deepspan.backends.torch_triton.kernels.weights import dequantise_weight
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.capacity import GIB
from deepspan.models.catalog import load_spec
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.quantise import quantise_fp8_blocks
from deepspan.models.sampling import sample
from tests.backends.opening import DEMO
from tests.gpu_path.opening import SPECS, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(128, 256), (130, 200), (7, 5)])
def test_blocks_are_quantised_as_defined(shape):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    weight[:, :3] = 0
    codes, scales = quantise_fp8_blocks(weight)
    got = quantise_blocks(torch.from_numpy(weight))
    np.testing.assert_array_equal(got.scales.numpy(), scales)
    np.testing.assert_array_equal(got.codes.view(torch.uint8).numpy(), codes)


def test_padding_and_stacking_keep_the_numbers():
    first, second = (torch.randn(rows, 136) for rows in (40, 200))
    quantised = [quantise_blocks(first), quantise_blocks(second)]
    stacked = dequantise_weight(
        Fp8Format(CPU, False).joined([pad_fp8(quantised[0], 128, 200), pad_fp8(quantised[1], 256, 200)])
    )
    assert stacked.shape == (384, 200)
    assert torch.equal(stacked[:40, :136], dequantise_weight(quantised[0]))
    assert torch.equal(stacked[128:328, :136], dequantise_weight(quantised[1]))
    stacked[:40, :136] = stacked[128:328, :136] = 0
    assert not stacked.any()


def test_codes_of_an_fp8_checkpoint_are_used_as_they_are():
    with Checkpoint.open(DEMO) as opened:
        spec = spec_from_hf(opened.config, "config.json")
        weights = CheckpointWeights(opened, spec)
        source = StoredTensors(spec, weights, CPU)
        for name in ("model.layers.0.self_attn.q_b_proj.weight", "model.layers.2.mlp.experts.3.down_proj.weight"):
            codes, scales = weights.fp8_blocks(name)
            got = source.fp8(name)
            np.testing.assert_array_equal(got.codes.view(torch.uint8).numpy(), codes)
            np.testing.assert_array_equal(got.scales.numpy(), scales)
            assert torch.equal(dequantise_weight(got).bfloat16(), source.plain(name))
        assert weights.fp8_blocks("lm_head.weight") is None


def test_drawn_weights_depend_on_the_name_and_the_seed_only():
    first, again, other = (DrawnTensors(SPECS["v3"], seed, CPU) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    again.plain("lm_head.weight")
    assert torch.equal(first.plain(name), again.plain(name))
    assert not torch.equal(first.plain(name), other.plain(name))
    assert 0.8 < float(first.plain(name).float().std()) * 136**0.5 < 1.2
    assert abs(float(first.plain("model.norm.weight").float().mean()) - 1) < 0.1


def test_sampled_tokens_equal_the_definition():
    rng = np.random.default_rng(2)
    count = 300
    logits = rng.normal(0, 2, (count, 83)).astype(np.float32)
    position = rng.integers(0, 100_000, count).astype(np.int32)
    sampling = Sampling(
        np.where(rng.random(count) < 0.2, 0, rng.uniform(0.1, 2, count)).astype(np.float32),
        rng.integers(0, 20, count).astype(np.int32),
        np.where(rng.random(count) < 0.3, 1, rng.uniform(0.1, 1, count)).astype(np.float32),
        rng.integers(0, 2**32, count, dtype=np.uint32),
    )
    unlimited = Sampling(sampling.temperature_B, 0 * sampling.top_k_B, 0 * sampling.top_p_B + 1, sampling.seed_B)
    for chosen, how in ((sampling, Draw.FILTERED), (unlimited, Draw.RANDOM)):
        assert draw_of(chosen) is how
        numbers = chosen.temperature_B, chosen.top_k_B, chosen.top_p_B
        wanted = sample(logits, position, *numbers, chosen.seed_B)
        tensors = map(torch.from_numpy, (position, *numbers, chosen.seed_B.view(np.int32)))
        got = draw(Logits(torch.from_numpy(logits)), SamplingNumbers(*tensors), how)
        np.testing.assert_array_equal(got.numpy(), wanted)
    greedy = Sampling(0 * sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.seed_B)
    assert draw_of(greedy) is Draw.GREEDY


def test_recorded_sizes():
    assert graphs.sizes(1) == [1]
    assert graphs.sizes(8) == [1, 2, 4, 8]
    assert graphs.sizes(48) == [1, 2, 4, 8, 16, 32, 48]


def test_cache_blocks_are_what_memory_leaves(monkeypatch):
    monkeypatch.setattr(room, "memory", lambda device: (40 * GIB, 64 * GIB))  # the host's moves while we look
    spec = load_spec("deepseek_v3")
    run, bigger = (
        build(SPECS["v3"], "fp8", device_memory_gib=gib, max_batch=4096, max_seq_len=96)._run for gib in (64.0, 65.0)
    )
    for kv_dtype, entry in (("bf16", 1152), ("fp8", 656)):
        blocks, more = (room.blocks_that_fit(spec, chosen, kv_dtype, 61, CPU) for chosen in (run, bigger))
        per_block = 61 * 8 * entry
        assert blocks < 40 * GIB / per_block
        assert abs(more - blocks - 0.9 * GIB / per_block) <= 1


def test_what_does_not_fit_is_refused_before_loading():
    spec = load_spec("deepseek_v3")
    runner = build(spec, "fp8", device_memory_gib=141.0)

    class Unread:
        has_mtp = True

        def names(self):
            return []

    with pytest.raises(InputError, match=r"fp8 weights and room for a step need 6\d\d\.\d GiB, the device has"):
        runner.load(Unread())


@pytest.mark.parametrize(
    "option, todo", [({"dtype": "fp32"}, "auto, bf16, fp8, w8a8 or int4"), ({"kv_dtype": "fp32"}, "auto, bf16 or fp8")]
)
def test_precisions_that_are_not_built_are_refused(option, todo):
    with pytest.raises(InputError, match=todo):
        build(SPECS["v3"], **{"dtype": "auto", **option})


def test_auto_is_fp8_for_models_published_in_fp8():
    assert build(load_spec("deepseek_v3"), "auto").dtype == "fp8"
    assert build(load_spec("deepseek_v2"), "auto").dtype == "bf16"


def test_odd_sizes_are_refused():
    from tests.specs import SPECS as ODD

    with pytest.raises(InputError, match="hidden_size 36 is not a multiple of 8"):
        build(ODD["v3"], "bf16")
