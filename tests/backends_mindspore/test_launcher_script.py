"""MindFormers' positional forms of scripts/msrun_launcher.sh: how many workers they start, where, how set."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launches import free_port

pytest.importorskip("mindspore", reason="mindspore is not installed")
pytestmark = pytest.mark.launch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "msrun_launcher.sh"
TEXT = "['--text', 'two words']"
SAY = """
import os, sys
names = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")
if os.environ.get("MS_ROLE") == "MS_WORKER":
    print("said", sys.argv[1:], *(os.environ.get(name) for name in names), flush=True)
"""


def start(folder, *arguments):
    """The launcher script in ``folder`` with a small program as its command."""
    (folder / "say.py").write_text(SAY)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "say.py --text 'two words'", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def said(log_dir, workers):
    """What each worker said, by log; waits for all of them, because msrun need not."""
    deadline = time.monotonic() + 60
    while True:
        logs = {log.name: log.read_text() for log in log_dir.glob("worker_*.log")}
        if len(logs) == workers and all("said" in text for text in logs.values()):
            return {name: text.partition("said ")[2].strip() for name, text in sorted(logs.items())}
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


@pytest.mark.parametrize(("arguments", "workers"), [((), 8), (("3",), 3)], ids=["1", "2"])
def test_one_and_two_arguments(tmp_path, arguments, workers):
    result = start(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    found = said(tmp_path / "output" / "msrun_log", workers)
    assert list(found) == [f"worker_{rank}.log" for rank in range(workers)]
    assert all(line.startswith(f"{TEXT} MS_WORKER {workers} 127.0.0.1 8118") for line in found.values())


def test_six_arguments(tmp_path):
    port = str(free_port())
    result = start(tmp_path, "2", port, "logs", "True", "30")
    assert result.returncode == 0, result.stderr
    for line in said(tmp_path / "logs", 2).values():
        assert line.startswith(f"{TEXT} MS_WORKER 2 127.0.0.1 {port}")


def test_nine_arguments(tmp_path):
    """Two nodes of one worker each, on the loopback address."""
    port = str(free_port())
    for node in "01":
        result = start(tmp_path, "2", "1", "127.0.0.1", port, node, f"logs{node}", "False", "30")
        assert result.returncode == 0, result.stderr
    for node in "01":
        [line] = said(tmp_path / f"logs{node}", 1).values()
        assert line.startswith(f"{TEXT} MS_WORKER 2 127.0.0.1 {port}")


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7, 9])
def test_other_counts_print_the_forms(tmp_path, count):
    """``count`` arguments after the command."""
    result = start(tmp_path, *["2"] * count)
    assert result.returncode == 1 and "COMMAND WORKERS LOCAL_WORKERS" in result.stderr


def test_a_number_of_workers_is_a_number(tmp_path):
    assert start(tmp_path, "many").returncode == 1
    result = start(tmp_path, "1")
    assert result.returncode == 0 and "python say.py" in result.stdout
