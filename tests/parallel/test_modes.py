"""Several processes on one machine, in every mode: the numbers and the tokens of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launches import free_port
from tests.parallel.scenario import SPECS, answers, forward, run_config

ROOT = Path(__file__).resolve().parents[2]
TWO = {
    "tp2": {"tp": 2},
    "ep2": {"tp": 2, "ep": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "dp2-ep2": {"dp": 2, "ep": 2},
}
FOUR = {
    "tp4": {"tp": 4},
    "tp4-ep2": {"tp": 4, "ep": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2-ep4": {"tp": 2, "dp": 2, "ep": 4},
    "dp4-ep2": {"dp": 4, "ep": 2},
    "dp2-ep2-pp2": {"dp": 2, "ep": 2, "pp": 2},
}
RELATIVE_NORM = 1e-5


@pytest.fixture(scope="module")
def single():
    """What one process computes: results of the steps, and answers."""
    run = run_config()
    return forward(run), answers(run)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder of results for all modes of one number of processes, which are started once."""
    folders = {}

    def compute(modes):
        count = 2 if modes is TWO else 4
        if count not in folders:
            folders[count] = folder = tmp_path_factory.mktemp(f"ranks{count}")
            (folder / "modes.json").write_text(json.dumps(modes))
            _run_workers(folder, count)
        return folders[count]

    return compute


def _run_workers(folder, count):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count),
              "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}  # fmt: skip
    workers = []
    for rank in range(count):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.parallel.worker", str(folder)]
        with (folder / f"{rank}.log").open("w") as log:
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [worker.wait(timeout=120) for worker in workers]
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(count))


@pytest.mark.parametrize(("modes", "name"), [(modes, name) for modes in (TWO, FOUR) for name in modes])
def test_ranks_together_compute_what_one_process_does(modes, name, found, single):
    wanted, wanted_answers = single
    got = dict(np.load(found(modes) / f"{name}.npz"))
    assert got.keys() == wanted.keys()
    for key, values in wanted.items():
        if values.dtype == np.float32:
            assert np.linalg.norm(got[key] - values) <= RELATIVE_NORM * np.linalg.norm(values), key
        else:
            assert got[key].tolist() == values.tolist(), key
    for spec in SPECS:
        np.testing.assert_array_equal(
            got[f"{spec}.5.logits_OV"], got[f"{spec}.0.logits_OV"][:2], "the same in any batch"
        )
    assert json.loads((found(modes) / f"{name}.json").read_text()) == wanted_answers
