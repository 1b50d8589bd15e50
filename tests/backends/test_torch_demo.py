"""The embedded FP8 checkpoint: reference and torch_triton say the same."""

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.sums import held_out_sums
from deepspan.serving.batch import GenerationOptions, complete
from deepspan.serving.engine import Engine, EngineLimits
from deepspan.serving.prompt import Tokenizer
from tests.backends.opening import (
    BLOCK,
    DEMO,
    WIDTH,
    loaded,
    logits_of,
    median_token_difference,
    relative_norm,
    token_differences,
)

EVERYDAY = ["请介绍一下北京的景点", "What is the capital of France?", "Hello"]
BF16 = 0.03  # docs/numerics.md; rounding the weights alone makes 0.01


@pytest.fixture(scope="module")
def demo():
    with Checkpoint.open(DEMO) as opened:
        spec = spec_from_hf(opened.config, "config.json")
        tokenizer = Tokenizer.open(DEMO)
        sums = held_out_sums(12, seed=3)
        prompts = [
            tokenizer.encode_chat([{"role": "user", "content": text}])
            for text in EVERYDAY + [question for question, _ in sums]
        ]
        yield spec, CheckpointWeights(opened, spec), tokenizer, prompts, [answer for _, answer in sums]


def generate(demo, dtype="fp32", backend_name="torch_triton", kv_dtype="auto", **options):
    spec, weights, tokenizer, prompts, _ = demo
    runner = loaded(spec, weights, dtype=dtype, backend_name=backend_name, kv_dtype=kv_dtype)
    limits = EngineLimits(max_batch=8, max_seq_len=BLOCK * WIDTH, max_batch_tokens=64)
    engine = Engine(runner, spec.vocab_size, limits, tokenizer)
    return complete(engine, prompts, GenerationOptions(stop_token_ids=frozenset(spec.eos_token_ids), **options))


@pytest.fixture(scope="module")
def reference(demo):
    return generate(demo, backend_name="reference")


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("fp32", "auto"), ("bf16", "auto"), ("bf16", "fp8")])
def test_greedy_tokens_equal_the_reference(demo, reference, dtype, kv_dtype):
    completions = generate(demo, dtype, kv_dtype=kv_dtype)
    assert [completion.token_ids for completion in completions] == [completion.token_ids for completion in reference]
    assert [completion.text for completion in completions[len(EVERYDAY) :]] == demo[4]


def test_sampled_tokens_equal_the_reference(demo):
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 11, "max_new_tokens": 24}
    wanted = generate(demo, backend_name="reference", **options)
    got = generate(demo, **options)
    assert [completion.token_ids for completion in got] == [completion.token_ids for completion in wanted]


def test_bf16_logits_are_close(demo, reference):
    spec, weights, _, prompts, _ = demo
    text = np.asarray([*prompts[0], *reference[0].token_ids], np.int32)[: BLOCK * WIDTH]
    wanted = logits_of(loaded(spec, weights, backend_name="reference"), text, [len(text)])
    assert relative_norm(logits_of(loaded(spec, weights), text, [len(text)]), wanted) <= 1e-5
    rounded = logits_of(loaded(spec, weights, dtype="bf16"), text, [len(text)])
    assert median_token_difference(rounded, wanted) <= BF16 / 2
    assert np.mean(token_differences(rounded, wanted) <= BF16) >= 0.9
