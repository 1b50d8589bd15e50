"""The GPU's path on two processes, in every way of sharing a model: the logits of one process, on both ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.weights import CheckpointWeights
from deepspan.models.hf_config import spec_from_hf
from tests.backends.opening import DEMO, median_token_difference
from tests.gpu_path.ranks import CASES, SHARED, TOKENS_ALONE, forward, result_name
from tests.launches import free_port

ROOT = Path(__file__).resolve().parents[2]
# Sums of halves are rounded once more: to BF16, and then to other codes here and there; halves of a row have a scale
# of their own for INT8. Shared experts left out make 0.4 to 0.5.
TOLERANCE = {"bf16": 0.03, "fp8": 0.1, "w8a8": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their logits of every mode."""
    target = tmp_path_factory.mktemp("ranks")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
              "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}  # fmt: skip
    workers = []
    for rank in range(2):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.gpu_path.ranks", str(target)]
        with (target / f"{rank}.log").open("w") as log:
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [worker.wait(timeout=400) for worker in workers]
    assert not any(codes), "\n".join((target / f"{rank}.log").read_text()[-2000:] for rank in range(2))
    return target


@pytest.fixture(scope="module")
def single():
    """Logits of one process and the experts that a step of it uses, by precision and spec."""
    cases = dict.fromkeys((dtype, number) for _, dtype, number, _ in CASES)
    return {(dtype, number): forward(list(SHARED.values())[number], dtype) for dtype, number in cases}


@pytest.mark.parametrize(("mode", "dtype", "number", "few"), CASES)
def test_two_ranks_compute_what_one_does(folder, single, mode, dtype, number, few):
    first, second = (np.load(folder / result_name(mode, dtype, number, few, rank)) for rank in range(2))
    logits, hit = single[dtype, number]
    np.testing.assert_array_equal(first["logits"], second["logits"])
    for part in (slice(None), TOKENS_ALONE):
        assert median_token_difference(first["logits"][part], logits[part]) <= TOLERANCE[dtype]
    assert len(first["hit"]) == len(hit) > 0
    assert np.abs(first["hit"] - hit).max() <= 1  # rounding tips a choice of a token here and there


def test_slices_of_fp8_weights_are_their_blocks():
    with Checkpoint.open(DEMO) as opened:
        weights = CheckpointWeights(opened, spec_from_hf(opened.config, "config.json"))
        name = "model.layers.0.mlp.gate_proj.weight"  # [520, 192]
        codes, scales = weights.fp8_blocks(name)
        part_codes, part_scales = weights.fp8_blocks(name, (128, 384), (128, 192))
        np.testing.assert_array_equal(part_codes, codes[128:384, 128:192])
        np.testing.assert_array_equal(part_scales, scales[1:3, 1:2])
        assert weights.fp8_blocks(name, (0, 260)) is None
        assert weights.fp8_blocks(name, (384, 520))[1].shape == (2, 2)
