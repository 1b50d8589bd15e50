"""torch_triton beyond the contract: precisions, forms of attention, independence of a request from its batch."""

import numpy as np
import pytest
import torch

from deepspan.backends.base import Sampling
from deepspan.backends.reference.runner import PagedSequence
from deepspan.backends.torch_triton import sampling as torch_sampling
from deepspan.models.catalog import load_spec
from deepspan.models.dtypes import F8_E4M3_VALUES, bf16_to_f32, f32_to_bf16
from deepspan.models.errors import InputError
from deepspan.models.params import parameters
from deepspan.models.quantise import quantise_activation_fp8
from deepspan.models.sampling import gumbel_noise, hash_u32, keep_mask, sample
from tests.backends.opening import (
    BF16,
    FP8_CACHE,
    DictWeights,
    build,
    loaded,
    logits_of,
    median_token_difference,
    random_tokens,
    relative_norm,
    step,
)
from tests.specs import SPECS, random_weights

V3 = SPECS["v3"]


@pytest.mark.parametrize("name", SPECS)
def test_bf16_is_close_to_fp32(name):
    spec, weights = SPECS[name], DictWeights(random_weights(SPECS[name]))
    tokens = random_tokens(spec, 64)
    wanted = logits_of(loaded(spec, weights), tokens, [64])
    got = logits_of(loaded(spec, weights, dtype="bf16"), tokens, [33, 28, 3])
    assert got.dtype == np.float32
    assert median_token_difference(got, wanted) <= BF16


@pytest.mark.parametrize("name", SPECS)
def test_the_forms_of_attention_agree(name):
    """At most four new tokens attend in the absorbed form, more in the expanded one."""
    spec = SPECS[name]
    runner, tokens = loaded(spec, DictWeights(random_weights(spec))), random_tokens(spec, 40)
    expanded = logits_of(runner, tokens, [40])
    assert relative_norm(logits_of(runner, tokens, [4] * 10, sequence=1), expanded) <= 1e-5
    assert relative_norm(logits_of(runner, tokens, [1] * 40, sequence=2), expanded) <= 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_drafts_are_verified_with_the_numbers_of_single_steps(dtype):
    """A step over several tokens of one sequence must accept exactly what one step a token would have sampled."""
    runner, tokens = loaded(V3, DictWeights(random_weights(V3)), dtype=dtype), random_tokens(V3, 12)
    single = logits_of(runner, tokens, [8, 1, 1, 1, 1])
    np.testing.assert_array_equal(logits_of(runner, tokens, [8, 4], sequence=1), single)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["v3", "v2: group-limited", "dense only"])
def test_a_request_has_the_same_bits_alone_and_in_any_batch(name, dtype):
    spec = SPECS[name]
    runner = loaded(spec, DictWeights(random_weights(spec)), dtype=dtype)
    prompts = [random_tokens(spec, length, seed=length) for length in (31, 6, 1, 17, 64, 3)]
    alone = [step(runner, [(0, 0, prompt)]).logits_OV[-1] for prompt in prompts]
    together = step(runner, [(i, 0, prompt) for i, prompt in enumerate(prompts)]).logits_OV
    ends = np.cumsum([len(prompt) for prompt in prompts])
    np.testing.assert_array_equal(together[ends - 1], np.stack(alone))

    following = [random_tokens(spec, 1, seed=100 + i) for i in range(len(prompts))]
    contexts = [len(prompt) for prompt in prompts]
    batch = step(runner, list(zip(range(len(prompts)), contexts, following, strict=True))).logits_OV
    for i, (context, token) in enumerate(zip(contexts, following, strict=True)):
        np.testing.assert_array_equal(step(runner, [(i, context, token)]).logits_OV[0], batch[i])
    beside_a_prompt = step(runner, [(7, 0, prompts[4]), (3, contexts[3], following[3])]).logits_OV
    np.testing.assert_array_equal(beside_a_prompt[-1], batch[3])


def test_the_cache_may_have_another_precision_than_the_weights():
    weights, tokens = DictWeights(random_weights(V3)), random_tokens(V3, 30)
    wanted = logits_of(loaded(V3, weights), tokens, [20] + [1] * 10)
    runner = loaded(V3, weights, kv_dtype="bf16")
    assert (runner.dtype, runner.kv_dtype) == ("fp32", "bf16")
    assert 1e-5 < median_token_difference(logits_of(runner, tokens, [20] + [1] * 10), wanted) <= BF16
    assert build(V3, dtype="bf16").kv_dtype == "bf16"


def _rounded_as_an_fp8_cache_does(latent):
    append = PagedSequence.append

    def append_rounded(self, layer, entries_TX):
        codes, scales = quantise_activation_fp8(entries_TX[:, :latent], ue8m0=True)
        latents = F8_E4M3_VALUES[codes] * scales.repeat(128, 1)[:, :latent]
        return append(self, layer, np.hstack([latents, bf16_to_f32(f32_to_bf16(entries_TX[:, latent:]))]))

    return append_rounded


@pytest.mark.parametrize("name", ["v3", "v3, half-split rope, odd heads"])
def test_an_fp8_cache_rounds_latents_and_nothing_else(name, monkeypatch):
    """In FP32 it gives the logits of the reference with the same rounding, in any pieces; without, others."""
    spec = SPECS[name].replace({"kv_lora_rank": 24})
    weights, tokens, pieces = DictWeights(random_weights(spec)), random_tokens(spec, 30), [15, 5, 3] + [1] * 7
    got = logits_of(loaded(spec, weights, kv_dtype="fp8"), tokens, pieces)
    plain = logits_of(loaded(spec, weights, backend_name="reference"), tokens, [len(tokens)])
    assert 0.01 < median_token_difference(got, plain) <= FP8_CACHE
    monkeypatch.setattr(PagedSequence, "append", _rounded_as_an_fp8_cache_does(24))
    rounded = logits_of(loaded(spec, weights, backend_name="reference"), tokens, [len(tokens)])
    assert median_token_difference(got, rounded) <= 1e-5


def test_an_fp8_cache_under_bf16_weights():
    spec = V3.replace({"kv_lora_rank": 24})
    weights, tokens, pieces = DictWeights(random_weights(spec)), random_tokens(spec, 30), [15, 5, 3] + [1] * 7
    wanted = logits_of(loaded(spec, weights, dtype="bf16"), tokens, pieces)
    got = logits_of(loaded(spec, weights, dtype="bf16", kv_dtype="fp8"), tokens, pieces)
    assert 0.01 < median_token_difference(got, wanted) <= FP8_CACHE


def test_noise_is_made_of_the_same_integers():
    words = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    words[:3] = 0, 1, 2**32 - 1
    hashed = torch_sampling.hash_u32(torch.from_numpy(words.astype(np.int64)))
    np.testing.assert_array_equal(hashed.numpy(), hash_u32(words))
    seeds, positions = words[:40], np.arange(40, dtype=np.int32) * 1000
    noise = torch_sampling.gumbel_noise(
        torch.from_numpy(seeds.astype(np.int64)), torch.from_numpy(positions.astype(np.int64)), range(300)
    )
    np.testing.assert_allclose(noise.numpy(), gumbel_noise(seeds, positions, 300), rtol=1e-5, atol=1e-6)


def test_filters_keep_the_same_tokens():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (200, 61)).astype(np.float32)
    logits[:50] = np.round(logits[:50])  # ties go to the lower id
    top_k, top_p = rng.integers(0, 70, 200).astype(np.int32), rng.uniform(0.05, 1, 200).astype(np.float32)
    kept = torch_sampling.filtered(*map(torch.from_numpy, (logits, top_k.astype(np.int64), top_p)))
    np.testing.assert_array_equal(torch.isfinite(kept).numpy(), keep_mask(logits, top_k, top_p))
    np.testing.assert_array_equal(kept.numpy()[np.isfinite(kept.numpy())], logits[np.isfinite(kept.numpy())])


def test_sampled_tokens_equal_the_definition():
    rng = np.random.default_rng(2)
    count = 400
    logits = rng.normal(0, 2, (count, 83)).astype(np.float32)
    position = rng.integers(0, 100_000, count).astype(np.int32)
    sampling = Sampling(
        np.where(rng.random(count) < 0.2, 0, rng.uniform(0.1, 2, count)).astype(np.float32),
        rng.integers(0, 20, count).astype(np.int32),
        np.where(rng.random(count) < 0.3, 1, rng.uniform(0.1, 1, count)).astype(np.float32),
        rng.integers(0, 2**32, count, dtype=np.uint32),
    )
    wanted = sample(logits, position, sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.seed_B)
    got = torch_sampling.sample(
        torch.from_numpy(logits),
        torch.from_numpy(position.astype(np.int64)),
        torch.from_numpy(sampling.temperature_B),
        torch.from_numpy(sampling.top_k_B.astype(np.int64)),
        torch.from_numpy(sampling.top_p_B),
        torch.from_numpy(sampling.seed_B.astype(np.int64)),
    )
    np.testing.assert_array_equal(got.numpy(), wanted)


class Unread(DictWeights):
    """Weights of a spec that must be refused before any of them is read."""

    def __init__(self, spec):
        super().__init__(dict.fromkeys(param.name for param in parameters(spec)))

    def read(self, name, dtype, rows=None, cols=None):
        raise AssertionError(f"{name} was read")


def test_too_little_memory_is_found_before_reading():
    spec = load_spec("deepseek_v3")
    with pytest.raises(InputError, match=r"not enough memory: 1\d{3}\.\d GiB needed"):
        loaded(spec, Unread(spec), dtype="bf16")


def test_missing_and_left_over_names():
    values = random_weights(V3)
    lacking = {name: value for name, value in values.items() if "q_a_proj" not in name}
    with pytest.raises(InputError, match=r"missing: model\.layers\.0\.self_attn\.q_a_proj\.weight and 3 more"):
        loaded(V3, DictWeights(lacking))
    with pytest.raises(InputError, match=r"no parameter for: model\.layers\.9\.self_attn\.q_a_proj\.weight"):
        loaded(V3, DictWeights({**values, "model.layers.9.self_attn.q_a_proj.weight": values["lm_head.weight"]}))


@pytest.mark.parametrize("dtype", ["fp8", "w8a8", "int4"])
def test_a_cpu_refuses_to_compute_in_low_precision(dtype):
    with pytest.raises(InputError, match=f"{dtype}: dtype: set it to auto, bf16 or fp32"):
        build(V3, dtype=dtype)


def test_what_a_cpu_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"kv_lora_rank 18 is not a multiple of 4: engine\.kv_dtype: fp8"):
        build(V3, kv_dtype="fp8")
    with pytest.raises(InputError, match="kv_dtype fp8: reference backend: it runs on the cpu in fp32"):
        build(V3, kv_dtype="fp8", backend_name="reference")
    with pytest.raises(InputError, match="does not run on ascend: device: set it to npu, or backend: mindspore_ascend"):
        build(V3, device="ascend")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="PyTorch finds no GPU here: device: cuda: set it to cpu"):
        build(V3, device="cuda")


def test_auto_is_a_precision_that_runs():
    runner = build(V3, dtype="auto")
    assert runner.dtype in ("bf16", "fp32")
    assert runner.kv_dtype == runner.dtype
