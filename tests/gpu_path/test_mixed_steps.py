"""Steps with prompts in sizes that come again: padded to a size, with the results of steps that run as they come."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepspan.backends.base import Sampling
from deepspan.backends.torch_triton.gpu import graphs
from deepspan.backends.torch_triton.gpu.inputs import DecodeBuffers
from deepspan.backends.torch_triton.gpu.mixed_inputs import MixedBuffers, MixedSize, mixed_size
from deepspan.backends.torch_triton.gpu.sampling import Draw
from deepspan.backends.torch_triton.kernels.prompt_attention import Tile
from tests.backends.opening import random_tokens, step_batch
from tests.gpu_path.opening import SPECS, loaded
from tests.specs import random_weights

SPEC = SPECS["v3"]
# (sequence, context, new tokens): each pair of steps has one size.
STEPS = [
    [(0, 0, 9)],
    [(1, 0, 13)],
    [(0, 9, 1), (2, 0, 12), (1, 13, 1)],
    [(1, 14, 1), (3, 0, 7), (0, 10, 1)],
    [(0, 11, 1), (2, 12, 6), (4, 0, 8), (5, 0, 5)],
    [(1, 15, 1), (3, 7, 5), (6, 0, 9), (7, 0, 6)],
]


def batch_of(pieces, outputs=1, temperature=0.0):
    batch = step_batch([(i, at, random_tokens(SPEC, at + new, i)[at:]) for i, at, new in pieces])
    count = len(pieces)
    numbers = np.arange(count)
    drawn = Sampling(
        np.full(count, temperature, np.float32), np.zeros(count, np.int32), np.ones(count, np.float32),
        (numbers * 7919).astype(np.uint32),
    )  # fmt: skip
    return replace(
        batch, num_outputs_B=np.full(count, outputs, np.int32), return_logits=False, sampling=drawn
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_results_are_those_of_steps_that_run_as_they_come(temperature):
    values = random_weights(SPEC)
    recorded, plain = (loaded(SPEC, values, "bf16", graphs=graphs_) for graphs_ in (True, False))
    for runner in (recorded, plain):
        with torch.inference_mode():
            runner._model.cache_LCZE.fill_(torch.nan)  # until something is written
    for pieces in STEPS:
        batch = batch_of(pieces, temperature=temperature)
        assert recorded.step(batch).token_ids_O.tolist() == plain.step(batch).token_ids_O.tolist()
    kept = recorded._mixed_steps._steps
    assert len(kept) == len(STEPS) // 2
    assert all(step is not None for step in kept.values())
    assert not plain._mixed_steps._steps
    written = ~torch.isnan(plain._model.cache_LCZE)
    assert torch.equal(written, ~torch.isnan(recorded._model.cache_LCZE))
    torch.testing.assert_close(
        recorded._model.cache_LCZE[written].float(), plain._model.cache_LCZE[written].float(), rtol=2**-6, atol=1e-2
    )


def test_a_chunk_without_an_output():
    values = random_weights(SPEC)
    runner, plain = (loaded(SPEC, values, "bf16", graphs=graphs_) for graphs_ in (True, False))
    for sequence in range(2):
        assert len(runner.step(batch_of([(sequence, 0, 9)], outputs=0)).token_ids_O) == 0
        plain.step(batch_of([(sequence, 0, 9)], outputs=0))
    follows = batch_of([(1, 9, 1)])
    assert runner.step(follows).token_ids_O.tolist() == plain.step(follows).token_ids_O.tolist()


@torch.inference_mode()
def test_a_first_run_leaves_cache_and_outputs():
    runner = loaded(SPEC, random_weights(SPEC), "bf16")
    model, recorder = runner._model, runner._mixed_steps._recorder
    model.cache_LCZE.fill_(torch.nan)
    model.last_O.fill_(7)
    size = MixedSize(64, 64, 2, 1)
    for buffers in (
        MixedBuffers(size, recorder.width, recorder.longest, recorder.device),
        DecodeBuffers(2, 1, recorder.width, recorder.longest, recorder.device),
    ):
        recorder.step(buffers, Draw.GREEDY).first_run()
        assert (model.last_O == 7).all()
        assert model.cache_LCZE.isnan().all()
        for prompts in buffers.step.prompts:
            assert (prompts.tiles_U[:, Tile._fields.index("queries")] > 0).all()


def test_sizes():
    def size(*pieces, outputs=1, expanded=100_000, longest=2048):
        tokens = [(i, at, np.zeros(new, np.int32)) for i, (at, new) in enumerate(pieces)]
        counts = np.full(len(pieces), outputs, np.int32)
        return mixed_size(replace(step_batch(tokens), num_outputs_B=counts), longest, expanded)

    assert size((0, 5)) == size((0, 16)) == MixedSize(16, 16, 0, 1)
    assert size((0, 17)) == size((0, 32)) == MixedSize(32, 32, 0, 1)
    assert size((0, 257)) == size((0, 288)) == MixedSize(288, 288, 0, 1)
    assert size((0, 1024)) == MixedSize(1024, 1024, 0, 1)
    assert size((0, 1025)) == size((0, 1152)) == MixedSize(1152, 1152, 0, 1)
    assert size((3, 1), (3, 1), (3, 1), (0, 20), (50, 20)) == MixedSize(48, 96, 4, 2)
    assert size((3, 1)) is None
    assert size((0, 20), (3, 2)) is None
    assert size((0, 20), outputs=2) is None
    assert size((0, 2048)) == MixedSize(2048, 2048, 0, 1)
    assert size((0, 2049)) is None
    assert size((2048, 2048)) == MixedSize(2048, 4096, 0, 1)
    assert size((2049, 2048)) is None
    assert size((0, 8192), longest=8192) == MixedSize(8192, 8192, 0, 1)
    assert size((0, 8193), longest=8192) is None
    assert size((0, 64), expanded=63) is None
    tiles = [(0, 129), (0, 1023), (0, 127)]
    assert sum(-(-new // 128) for _, new in tiles) <= size(*tiles).tiles


def test_those_that_were_used_last_stay(monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_MIXED", 2)
    runner = loaded(SPEC, random_weights(SPEC), "bf16")
    one, two, three = ([(0, 0, 9)], [(0, 0, 9), (1, 0, 9)], [(0, 0, 9), (1, 9, 1)])
    for pieces in (one, two, one, three, one):
        runner.step(batch_of(pieces))
    sizes = [(size.prompts, size.decoding) for size, _ in runner._mixed_steps._steps]
    assert sizes == [(1, 1), (1, 0)]
