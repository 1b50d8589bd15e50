"""The embedded checkpoint is what docs/demo-model.md says: its form, what it was never shown, what it answers."""

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.catalog import load_spec
from deepspan.models.everyday import EVERYDAY, FALLBACK_CHINESE, FALLBACK_ENGLISH, KNOWN, normalised, unknown_exchange
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import stored_tensors
from deepspan.models.reference import GrowingCache, ReferenceModel
from deepspan.models.sums import held_out_sums, is_held_out, training_sums
from deepspan.scripts.demo_model.config import CONFIG
from deepspan.serving.prompt import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
MAX_BYTES = 8_000_000
EOS = 1


@pytest.fixture(scope="module")
def checkpoint():
    with Checkpoint.open(DEMO) as opened:
        yield opened


@pytest.fixture(scope="module")
def answer(checkpoint):
    """Greedy completion of one chat prompt by the numpy reference."""
    spec = spec_from_hf(checkpoint.config, "config.json")
    weights = CheckpointWeights(checkpoint, spec)
    values = {name: weights.read(name, "f32") for name in weights.names()}
    model = ReferenceModel(spec, values, 512)
    tokenizer = Tokenizer.open(DEMO)

    def complete(prompt: str) -> str:
        cache, produced = GrowingCache(), []
        step = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        while len(produced) < 120:
            hidden_TD = model.hidden(np.asarray(step, np.int32), [cache], [len(step)])
            cache.length += len(step)
            token = int(model.logits(hidden_TD[-1:]).argmax())
            if token == EOS:
                break
            produced.append(token)
            step = [token]
        return tokenizer.decode(produced)

    return complete


def test_it_is_small_and_every_tensor_of_its_spec_is_stored_as_published_checkpoints_are(checkpoint):
    spec = load_spec("demo")
    assert spec_from_hf(checkpoint.config, "config.json") == spec
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= MAX_BYTES
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(spec)}
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == wanted


def test_some_scales_lie_in_another_shard_than_their_weight(checkpoint):
    scales = [name for name in checkpoint.tensors if name.endswith("_scale_inv")]
    elsewhere = [
        name for name in scales if checkpoint.tensors[name].path != checkpoint.tensors[name[: -len("_scale_inv")]].path
    ]
    assert len(checkpoint.headers) >= 2
    assert 0 < len(elsewhere) < len(scales)


def test_the_architecture_is_exercised():
    spec = load_spec("demo")
    assert spec.q_lora_rank and spec.yarn and spec.first_k_dense_replace == 1 and spec.num_nextn_predict_layers == 1
    assert spec.topk_method == "noaux_tc" and spec.scoring_func == "sigmoid" and spec.n_shared_experts
    assert all(size % 4 == 0 for size in (spec.num_attention_heads, spec.n_routed_experts, spec.n_group))
    assert any(size % 128 for size in (spec.hidden_size, spec.intermediate_size, spec.moe_intermediate_size))


def test_the_training_script_makes_this_architecture():
    assert spec_from_hf(CONFIG, "CONFIG") == load_spec("demo")


def test_held_out_pairs_are_the_same_in_both_orders_and_about_one_in_fifty():
    pairs = [(a, b) for a in range(0, 1000, 7) for b in range(0, 1000, 11)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    assert 0.015 < np.mean([is_held_out(a, b) for a, b in pairs]) < 0.025


def test_training_never_sees_a_held_out_pair():
    seen = {(question.a, question.b) for question in islice(training_sums(random.Random(0)), 50_000)}
    assert not any(is_held_out(a, b) for a, b in seen)


def test_the_evaluation_asks_nothing_else():
    questions = held_out_sums(500)
    assert questions == held_out_sums(500) and len(dict(questions)) == 500
    for prompt, result in questions:
        a, b = (int(part) for part in "".join(c if c.isdigit() else " " for c in prompt).split())
        assert is_held_out(a, b)
        assert int(result) in (a + b, a - b, b - a)


@pytest.mark.parametrize("seed", range(3))
def test_unknown_prompts_are_not_known_ones(seed):
    for prompt, fallback in (unknown_exchange(random.Random(f"{seed}-{i}")) for i in range(300)):
        assert normalised(prompt) not in KNOWN
        assert fallback in (FALLBACK_ENGLISH, FALLBACK_CHINESE)


def test_the_tokenizer_keeps_every_text_and_splits_digits():
    tokenizer = Tokenizer.open(DEMO)
    assert tokenizer.vocab_size <= load_spec("demo").vocab_size
    for text in ("请介绍一下北京的景点", "What is 123 + 45?", "ünïcödé 😀\n\ttab", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode_raw(text)) == text
    assert len(tokenizer.encode_raw("987654")) - len(tokenizer.encode_raw("")) == 6


def test_it_answers_held_out_sums(answer):
    questions = held_out_sums(24, seed=7)
    assert [answer(prompt) for prompt, _ in questions] == [result for _, result in questions]


@pytest.mark.parametrize("prompt", ["请介绍一下北京的景点", "Hello", "What is the capital of France?", "谢谢"])
def test_it_answers_everyday_prompts(answer, prompt):
    assert answer(prompt) == next(text for prompts, text in EVERYDAY if prompt in prompts)


def test_it_says_what_it_does_not_know(answer):
    assert answer("Tell me about the museum of Peru.") == FALLBACK_ENGLISH
