"""Sums over shared memory between two processes: of one GPU where there is one; CPUs have none and say so."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.device import DEVICE
from tests.launches import free_port

ROOT = Path(__file__).resolve().parents[2]


def start(rank: int, port: int, **settings: str) -> subprocess.Popen:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}  # fmt: skip
    environment = {**os.environ, **shared, **settings, "RANK": str(rank), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "tests.gpu_path.symmetric_rank"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(*ranks: subprocess.Popen) -> list[tuple[dict, str]]:
    """What each printed, and its messages."""
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(messages[-2000:] for _, messages in ended)
    return [(json.loads(output), messages) for output, messages in ended]


def test_sums_of_two_processes():
    port = free_port()
    for number, (found, messages) in enumerate(finish(start(0, port), start(1, port))):
        assert found == {"connected": DEVICE.type != "cpu", "right": True}
        if DEVICE.type == "cpu":
            assert f"note: a library adds small matrices, too: rank {number}: Symm" in messages


def test_the_switch_leaves_sums_to_the_library():
    port = free_port()
    ended = finish(*(start(rank, port, DEEPSPAN_SMALL_SUMS="0") for rank in range(2)))
    assert [found for found, _ in ended] == [{"connected": False, "right": True}] * 2
    assert not any("note:" in messages for _, messages in ended)


def test_a_group_over_hosts_leaves_sums_to_the_library():
    port = free_port()
    for found, messages in finish(*(start(rank, port, LOCAL_WORLD_SIZE="1") for rank in range(2))):
        assert found == {"connected": False, "right": True}
        assert "its tensor-parallel group spans hosts" in messages
