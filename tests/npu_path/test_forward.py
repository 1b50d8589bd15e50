"""The NPU's forward pass, with its plain operators, against the reference and the CPU's.

In FP32 nothing but the order of sums may differ. Other tolerances are medians over tokens, as in the GPU's tests:
rounding can tip a router's choice.
"""

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models import quantise
from deepspan.models.errors import InputError
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import parameters
from deepspan.models.quant import dequant_int8_channels
from deepspan.serving.prompt import Tokenizer
from tests.backends.opening import (
    BF16,
    DEMO,
    DictWeights,
    logits_of,
    median_token_difference,
    random_tokens,
    relative_norm,
    sensible_values,
    step,
)
from tests.backends.opening import loaded as loaded_on_cpu
from tests.npu_path.opening import loaded, opened
from tests.specs import SPECS, random_weights

FP32 = 1e-5
INT8_ACTIVATIONS = 0.1  # 1/127 of a token's largest value; random weights of small models do not average it out
DEMO_BF16, DEMO_W8A8 = 0.03, 0.05
PIECES = [7, 1, 6, 3, 1]


@pytest.mark.parametrize("name", SPECS)
def test_fp32_is_the_reference(name):
    """A prompt, decoding, a chunk at an offset, several tokens to verify."""
    spec, values = SPECS[name], random_weights(SPECS[name])
    tokens = random_tokens(spec, sum(PIECES))
    wanted = logits_of(loaded_on_cpu(spec, DictWeights(values), backend_name="reference"), tokens, [len(tokens)])
    got = logits_of(loaded(spec, values, "fp32"), tokens, PIECES)
    assert got.dtype == np.float32
    assert relative_norm(got, wanted) <= FP32


@pytest.mark.parametrize("name", ["v3", "v2-lite: no q_lora, greedy", "v3, half-split rope, odd heads"])
def test_bf16_follows_the_reference(name):
    spec, values = SPECS[name], random_weights(SPECS[name])
    tokens = random_tokens(spec, sum(PIECES))
    wanted = logits_of(loaded_on_cpu(spec, DictWeights(values), backend_name="reference"), tokens, [len(tokens)])
    assert median_token_difference(logits_of(loaded(spec, values, "bf16"), tokens, PIECES), wanted) <= BF16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_may_mix_prompts_decoding_and_several_tokens(dtype):
    """Each sequence's logits in one step with the others, and in steps of its own; prompts in calls of two."""
    spec, values = SPECS["v3"], random_weights(SPECS["v3"])
    runner = loaded(spec, values, dtype, max_seq_len=20, max_batch_tokens=20)
    tokens = [random_tokens(spec, 13, seed) for seed in range(6)]
    contexts, ends = [6, 0, 7, 5, 4, 0], [7, 12, 9, 12, 13, 6]
    alone = []
    for sequence, (context, end) in enumerate(zip(contexts, ends, strict=True)):
        if context:
            step(runner, [(sequence, 0, tokens[sequence][:context])])
        alone.append(step(runner, [(sequence, context, tokens[sequence][context:end])]).logits_OV)
    together = step(runner, [(i, contexts[i], tokens[i][contexts[i] : ends[i]]) for i in range(6)])
    assert median_token_difference(together.logits_OV, np.concatenate(alone)) <= (2**-7 if dtype == "bf16" else 1e-5)
    assert together.token_ids_O.tolist() == together.logits_OV.argmax(axis=1).tolist()


@pytest.mark.parametrize("name", ["v3", "v3, MTP before the norm"])
def test_drafts_are_those_of_the_cpu(name):
    spec, values = SPECS[name], random_weights(SPECS[name])
    tokens = random_tokens(spec, 11)
    wanted = step(loaded_on_cpu(spec, DictWeights(values), dtype="fp32"), [(0, 0, tokens)], draft=True)
    got = step(loaded(spec, values, "fp32"), [(0, 0, tokens)], draft=True)
    assert got.token_ids_O.tolist() == wanted.token_ids_O.tolist()
    assert relative_norm(got.draft_logits_OV, wanted.draft_logits_OV) <= FP32
    assert got.draft_token_ids_O.tolist() == got.draft_logits_OV.argmax(axis=1).tolist()


def test_w8a8_follows_the_reference_on_the_same_weights():
    spec = SPECS["v3"]
    low = {param.name for param in parameters(spec) if param.quantised and "kv_b_proj" not in param.name}
    values = {
        name: dequant_int8_channels(*quantise.quantise_int8_channels(value), "f32") if name in low else value
        for name, value in sensible_values(spec).items()
    }
    tokens = random_tokens(spec, sum(PIECES))
    wanted = logits_of(loaded_on_cpu(spec, DictWeights(values), backend_name="reference"), tokens, [len(tokens)])
    got = logits_of(loaded(spec, values, "w8a8"), tokens, PIECES)
    assert 1e-3 < median_token_difference(got, wanted) <= INT8_ACTIVATIONS


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", FP32), ("bf16", DEMO_BF16), ("w8a8", DEMO_W8A8)])
def test_the_embedded_checkpoint(dtype, tolerance):
    with Checkpoint.open(DEMO) as checkpoint:
        spec = spec_from_hf(checkpoint.config, "config.json")
        weights = CheckpointWeights(checkpoint, spec)
        text = "12 + 30 = 42. Hello! What is the capital of France? 请介绍一下北京的景点"
        tokens = np.asarray(Tokenizer.open(DEMO).encode_raw(text), np.int32)
        wanted = logits_of(loaded_on_cpu(spec, weights, backend_name="reference"), tokens, [len(tokens)])
        got = logits_of(opened(spec, weights, dtype), tokens, [len(tokens) - 4, 1, 3])
    assert relative_norm(got, wanted) <= tolerance


@pytest.mark.parametrize(("dtype", "engine"), [("fp8", {}), ("int4", {}), ("bf16", {"kv_dtype": "fp8"})])
def test_other_formats_are_refused(dtype, engine):
    with pytest.raises(InputError, match="an NPU"):
        loaded(SPECS["v3"], random_weights(SPECS["v3"]), dtype, **engine)
