"""One suite for every backend that is installed: the same numbers as the numpy reference, on small odd-sized specs.

A backend may differ from the reference by float32 rounding only; drift is a failure here before it is a surprise.
"""

from dataclasses import replace

import numpy as np
import pytest

from deepspan import backends
from deepspan.backends.base import Sampling, StepBatch
from deepspan.configs.schema import RunConfig
from deepspan.models.errors import InputError
from deepspan.models.reference import GrowingCache, ReferenceModel
from tests.specs import SPECS, random_weights

BLOCK = 4
RELATIVE_NORM = 1e-5
INSTALLED = [name for name in backends.REQUIREMENTS if backends.is_built(name) and not backends.missing_package(name)]


class DictWeights:
    """Weights held in a dictionary, as a runner wants them."""

    def __init__(self, values, has_mtp=True):
        self.values = values
        self.has_mtp = has_mtp

    def names(self):
        return list(self.values)

    def format(self, name):
        return "f32"

    def group_size(self, name):
        return None

    def read(self, name, dtype, rows=None, cols=None):
        assert dtype == "f32", "these tests run in float32"
        value = self.values[name]
        value = value[slice(*rows) if rows else slice(None)]
        return value if value.ndim == 1 else value[:, slice(*cols) if cols else slice(None)]


@pytest.fixture(params=INSTALLED)
def backend_name(request):
    return request.param


def open_runner(backend_name, spec, weights=None, **engine):
    run = RunConfig.model_validate(
        {
            "model": {"spec": "demo", "weights": "random"},
            "backend": backend_name,
            "device": "cpu",
            "dtype": "fp32",
            "engine": {"max_batch": 4, "max_seq_len": 64, "block_size": BLOCK, **engine},
        }
    )
    backend = backends.load(backend_name)
    runner = backend.build(spec, run, backend.start(run))
    runner.load(weights or DictWeights(random_weights(spec)))
    return runner


def greedy(count):
    zeros = np.zeros(count, np.int32)
    return Sampling(np.zeros(count, np.float32), zeros, np.ones(count, np.float32), zeros.astype(np.uint32))


class Sequences:
    """Several token sequences fed to a runner in arbitrary pieces, over scattered cache blocks."""

    def __init__(self, runner, tokens, seed=0):
        blocks = np.random.default_rng(seed).permutation(runner.kv_blocks).astype(np.int32)
        self.runner = runner
        self.tokens = tokens
        self.done = [0] * len(tokens)
        self.width = 16
        assert len(tokens) * self.width <= runner.kv_blocks
        self.tables = blocks[: len(tokens) * self.width].reshape(len(tokens), self.width)
        self.logits = [[] for _ in tokens]
        self.drafts = [[] for _ in tokens]

    def feed(self, pieces: dict[int, int], draft=False):
        """Feed ``pieces[i]`` more tokens of sequence i, all in one step, with logits at every position."""
        chosen = list(pieces)
        counts = np.array([pieces[i] for i in chosen], np.int32)
        spans = [(i, self.done[i], self.done[i] + pieces[i]) for i in chosen]
        tables = self.tables[chosen].copy()
        for row, (_, _, end) in enumerate(spans):
            tables[row, -(-end // BLOCK) :] = 2**31 - 1  # entries past the sequence must not be read
        batch = StepBatch(
            token_ids_T=np.concatenate([self.tokens[i][a:b] for i, a, b in spans]).astype(np.int32),
            query_lens_B=counts,
            context_lens_B=np.array([a for _, a, _ in spans], np.int32),
            block_tables_BM=tables,
            num_outputs_B=counts,
            sampling=greedy(len(chosen)),
            return_logits=True,
            draft=draft,
        )
        result = self.runner.step(batch)
        assert result.token_ids_O.tolist() == result.logits_OV.argmax(axis=1).tolist()
        cut = np.cumsum(counts)[:-1]
        for (i, _, end), logits in zip(spans, np.split(result.logits_OV, cut), strict=True):
            self.logits[i].append(logits)
            self.done[i] = end
        if draft:
            assert result.draft_token_ids_O.tolist() == result.draft_logits_OV.argmax(axis=1).tolist()
            for (i, _, _), logits in zip(spans, np.split(result.draft_logits_OV, cut), strict=True):
                self.drafts[i].append(logits)


def reference_logits(spec, weights, tokens):
    model, cache = ReferenceModel(spec, weights, 64, "naive"), GrowingCache()
    return model.logits(model.hidden(tokens, [cache], [len(tokens)]))


def assert_same(got, wanted):
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    assert np.linalg.norm(got - wanted) <= RELATIVE_NORM * np.linalg.norm(wanted)


def prompts(spec, lengths, seed=11):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.vocab_size, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_reference_however_they_are_fed(backend_name, name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    tokens = prompts(spec, (13, 1, 22))
    batch = Sequences(open_runner(backend_name, spec), tokens)
    batch.feed({0: 5, 2: 9})  # two first chunks
    batch.feed({1: 1, 0: 1, 2: 6})  # a one-token prompt beside a decode step and a chunk at an offset
    batch.feed({2: 1, 0: 1})
    batch.feed({0: 6, 2: 6})
    for got, sequence in zip(batch.logits, tokens, strict=True):
        assert_same(np.concatenate(got), reference_logits(spec, weights, sequence))


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.num_nextn_predict_layers])
def test_mtp_drafts_equal_the_reference(backend_name, name):
    """Teacher forcing is the sampled token here: each output's draft follows the token that the step sampled."""
    spec, weights = SPECS[name], random_weights(SPECS[name])
    tokens = prompts(spec, (9, 6))
    batch = Sequences(open_runner(backend_name, spec), tokens)
    batch.feed({0: 9, 1: 4}, draft=True)
    batch.feed({1: 2}, draft=True)
    for drafts, sequence in zip(batch.drafts, tokens, strict=True):
        model, cache = ReferenceModel(spec, weights, 64), GrowingCache()
        hidden = model.hidden(sequence, [cache], [len(sequence)])
        sampled = model.logits(hidden).argmax(axis=1).astype(np.int32)
        assert_same(np.concatenate(drafts), model.mtp_logits(hidden, sampled, [cache], [len(sequence)]))


def test_a_chunk_without_outputs_takes_the_next_token_from_the_batch(backend_name):
    spec, weights = SPECS["v3"], random_weights(SPECS["v3"])
    (tokens,) = prompts(spec, (8,))
    runner = open_runner(backend_name, spec)
    table = np.arange(4, dtype=np.int32)[None]
    first = StepBatch(
        tokens[:5], np.array([5], np.int32), np.array([0], np.int32), table, np.array([0], np.int32), greedy(1),
        return_logits=True, draft=True, next_token_ids_B=tokens[5:6],
    )  # fmt: skip
    assert runner.step(first).token_ids_O.shape == (0,)
    last = replace(
        first, token_ids_T=tokens[5:], query_lens_B=np.array([3], np.int32), context_lens_B=np.array([5], np.int32),
        num_outputs_B=np.array([1], np.int32), next_token_ids_B=np.array([0], np.int32),
    )  # fmt: skip
    result = runner.step(last)
    model, cache = ReferenceModel(spec, weights, 64), GrowingCache()
    hidden = model.hidden(tokens, [cache], [8])
    following = np.append(tokens[1:], result.token_ids_O).astype(np.int32)
    assert_same(result.logits_OV, model.logits(hidden)[-1:])
    assert_same(result.draft_logits_OV, model.mtp_logits(hidden, following, [cache], [8])[-1:])


def test_sampled_tokens_follow_the_definition_and_not_the_batch(backend_name):
    from deepspan.models.sampling import sample

    spec = SPECS["v3"]
    tokens = prompts(spec, (6, 9, 3, 4))
    runner = open_runner(backend_name, spec)
    sampling = Sampling(
        np.array([0.0, 1.3, 0.7, 1.0], np.float32),
        np.array([0, 0, 5, 0], np.int32),
        np.array([1.0, 1.0, 1.0, 0.6], np.float32),
        np.array([1, 2, 3, 2**32 - 1], np.uint32),
    )

    def step(rows):
        pick = np.array(rows)
        return runner.step(
            StepBatch(
                np.concatenate([tokens[i] for i in rows]),
                np.array([len(tokens[i]) for i in rows], np.int32),
                np.zeros(len(rows), np.int32),
                np.arange(len(rows) * 3, dtype=np.int32).reshape(-1, 3),
                np.ones(len(rows), np.int32),
                Sampling(*(getattr(sampling, field)[pick] for field in Sampling.__dataclass_fields__)),
                return_logits=True,
            )
        )

    together = step([0, 1, 2, 3])
    wanted = sample(
        together.logits_OV,
        np.array([len(t) - 1 for t in tokens], np.int32),
        sampling.temperature_B,
        sampling.top_k_B,
        sampling.top_p_B,
        sampling.seed_B,
    )
    assert together.token_ids_O.tolist() == wanted.tolist()
    assert [step([i]).token_ids_O[0] for i in range(4)] == wanted.tolist()
    assert step([3, 1]).token_ids_O.tolist() == [wanted[3], wanted[1]]


def test_a_checkpoint_without_the_mtp_layer_runs_and_refuses_drafts(backend_name):
    spec = SPECS["v3"]
    weights = {name: value for name, value in random_weights(spec).items() if ".layers.3." not in name}
    batch = Sequences(open_runner(backend_name, spec, DictWeights(weights, has_mtp=False)), prompts(spec, (5,)))
    with pytest.raises(InputError, match="MTP"):
        batch.feed({0: 2}, draft=True)
    batch.feed({0: 5})
    assert_same(batch.logits[0][0], reference_logits(spec, random_weights(spec), batch.tokens[0]))


def test_wrong_shapes_are_named(backend_name):
    spec = SPECS["v3"]
    values = random_weights(spec)
    values["model.layers.1.mlp.experts.5.up_proj.weight"] = np.zeros((22, 35), np.float32)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        open_runner(backend_name, spec, DictWeights(values))


def test_limits_are_refused_before_anything_is_allocated(backend_name):
    with pytest.raises(InputError, match="max_seq_len 300 is longer than the model's 256"):
        open_runner(backend_name, SPECS["v3"], max_seq_len=300)
    sparse = SPECS["v3"].replace({"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8})
    with pytest.raises(InputError, match="not supported yet"):
        open_runner(backend_name, sparse)
