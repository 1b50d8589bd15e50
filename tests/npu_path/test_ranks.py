"""The NPU's path on two processes, in every way of sharing a model: the logits of one process, on both ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backends.opening import median_token_difference, relative_norm
from tests.launches import free_port
from tests.npu_path.ranks import CASES, forward

ROOT = Path(__file__).resolve().parents[2]
INT8_ACTIVATIONS = 0.1  # parts of a matrix have scales of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their logits of every mode."""
    target = tmp_path_factory.mktemp("ranks")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
              "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    workers = []
    for rank in range(2):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.npu_path.ranks", str(target)]
        with (target / f"{rank}.log").open("w") as log:
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [worker.wait(timeout=300) for worker in workers]
    assert not any(codes), "\n".join((target / f"{rank}.log").read_text()[-2000:] for rank in range(2))
    return target


@pytest.fixture(scope="module")
def single():
    """The logits of one process, by precision."""
    return {dtype: forward(dtype) for dtype in {dtype for _, dtype in CASES}}


@pytest.mark.parametrize(("mode", "dtype"), CASES)
def test_two_ranks_compute_what_one_does(folder, single, mode, dtype):
    first, second = (np.load(folder / f"{mode}-{dtype}-{rank}.npy") for rank in range(2))
    np.testing.assert_array_equal(first, second)
    if dtype == "fp32":
        assert relative_norm(first, single[dtype]) <= 1e-5
    else:
        assert median_token_difference(first, single[dtype]) <= INT8_ACTIVATIONS
