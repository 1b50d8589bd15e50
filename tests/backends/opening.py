"""Runners of torch_triton for tests, and token sequences fed to them in any pieces."""

from pathlib import Path

import numpy as np

from deepspan import backends
from deepspan.backends.base import Sampling, StepBatch
from deepspan.configs.schema import RunConfig
from deepspan.models.params import parameters
from deepspan.models.quant import round_to
from deepspan.serving.batch import greedy_sampling

BLOCK = 8
WIDTH = 12  # blocks a sequence
FP8_CACHE = 0.25  # median token's difference of a run with an FP8 cache from one with another, for random weights
BF16 = 0.06  # median token's difference of a BF16 run from FP32, for random weights
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


class DictWeights:
    """FP32 values by name, as a runner wants them."""

    def __init__(self, values, has_mtp=True):
        self.values = values
        self.has_mtp = has_mtp

    def names(self):
        return list(self.values)

    def read(self, name, dtype, rows=None, cols=None):
        value = self.values[name][slice(*rows) if rows else slice(None)]
        return round_to(value if value.ndim == 1 else value[:, slice(*cols) if cols else slice(None)], dtype)

    def format(self, name):
        return "f32"

    def group_size(self, name):
        return None

    def fp8_blocks(self, name, rows=None, cols=None):
        return None

    int8_channels = int8_blocks = int4 = fp8_blocks


def build(spec, dtype="fp32", backend_name="torch_triton", device="auto", **engine):
    run = RunConfig.model_validate(
        {
            "model": {"spec": "demo", "weights": "random"},
            "backend": backend_name,
            "device": device,
            "dtype": dtype,
            "engine": {"max_batch": 8, "max_seq_len": BLOCK * WIDTH, "block_size": BLOCK, **engine},
        }
    )
    backend = backends.load(backend_name)
    return backend.build(spec, run, backend.start(run))


def loaded(spec, weights, **options):
    runner = build(spec, **options)
    runner.load(weights)
    return runner


def step_batch(pieces, sampling: Sampling | None = None, **options):
    """``pieces`` are (sequence, context, new token ids); logits at every new position."""
    counts = np.array([len(tokens) for _, _, tokens in pieces], np.int32)
    tables = [np.arange(WIDTH, dtype=np.int32) + WIDTH * sequence for sequence, _, _ in pieces]
    return StepBatch(
        token_ids_T=np.concatenate([tokens for _, _, tokens in pieces]).astype(np.int32),
        query_lens_B=counts,
        context_lens_B=np.array([context for _, context, _ in pieces], np.int32),
        block_tables_BM=np.stack(tables),
        num_outputs_B=counts,
        sampling=sampling or greedy_sampling(len(pieces)),
        return_logits=True,
        **options,
    )


def step(runner, pieces, sampling: Sampling | None = None, **options):
    """One step of what `step_batch` makes."""
    return runner.step(step_batch(pieces, sampling, **options))


def logits_of(runner, tokens, pieces, sequence=0):
    """Logits at all positions of one sequence that is fed ``pieces`` tokens at a time."""
    assert sum(pieces) == len(tokens)
    starts = np.cumsum(pieces) - pieces
    parts = [(sequence, start, tokens[start : start + count]) for start, count in zip(starts, pieces, strict=True)]
    return np.concatenate([step(runner, [part]).logits_OV for part in parts])


def random_tokens(spec, count, seed=0):
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count).astype(np.int32)


def relative_norm(got, wanted):
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def token_differences(got, wanted):
    """Each token's relative norm."""
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def median_token_difference(got, wanted):
    """The median token's relative norm: where rounding tips a router's choice, one token may differ by any amount."""
    return float(np.median(token_differences(got, wanted)))


def sensible_values(spec, seed=0):
    """FP32 weights that a low-bit format can hold: normal, so that attention and routing are not flat."""
    rng = np.random.default_rng(seed)
    values = {}
    for param in parameters(spec):
        if len(param.shape) == 2:
            scale = 1.0 if "embed_tokens" in param.name else 1.5 / np.sqrt(param.shape[1])
            values[param.name] = rng.normal(0, scale, param.shape).astype(np.float32)
        else:
            values[param.name] = rng.uniform(0.5, 1.5, param.shape).astype(np.float32)
    return values
