"""``deepspan launch`` with torchrun: one voice, one node and two, and what a failure ends in."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.launches import free_port, launch, token_ids
from tests.parallel.scenario import PROMPTS, answers, run_config

GENERATE = ["generate", "--json", "--max-new-tokens", "12", *(f"--prompt={prompt}" for prompt in PROMPTS)]

LONG = ["bench", "--context=16", "--steps=1000", f"--batch={','.join(['1'] * 100)}", "--prefill=none"]


@pytest.fixture
def write_run(tmp_path):
    """A run of the embedded model over the processes of one or two nodes, as a YAML."""

    def write(parallel, procs_per_node, nodes=1, timeout=60):
        path = tmp_path / "run.yaml"
        path.write_text(
            f"""
model: {{spec: demo}}
device: cpu
dtype: fp32
parallel: {parallel}
engine: {{max_batch: 8, max_seq_len: 256}}
sampling: {{temperature: 0}}
launch: {{launcher: torchrun, nodes: {nodes}, procs_per_node: {procs_per_node}, master_port: {free_port()},
         log_dir: {tmp_path / "log"}, timeout: {timeout}, env: {{OMP_NUM_THREADS: "1"}}}}
"""
        )
        return path

    return write


def process_of(log):
    return int(re.search(r"is process (\d+)", log.read_text())[1])


def is_alive(process):
    """Whether it runs: one that ended may wait for its parent."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_two_workers_answer_with_one_voice(write_run):
    job = launch(write_run("{tp: 2, ep: 2}", 2), *GENERATE)
    output, messages = job.communicate(timeout=100)
    assert (job.returncode, messages) == (0, "")
    assert token_ids(output) == answers(run_config())


@pytest.mark.launch
@pytest.mark.parametrize("parallel", ["{tp: 2, pp: 2}", "{dp: 2, tp: 2, ep: 4}"])
def test_two_nodes_of_two_workers(write_run, tmp_path, parallel):
    path = write_run(parallel, 2, nodes=2)
    jobs = [launch(path, *GENERATE, flags=["--node-rank", node]) for node in "01"]
    (output, messages), (other_output, _) = (job.communicate(timeout=200) for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], messages
    assert token_ids(output) == answers(run_config())
    assert not other_output, "the first node has the results"
    assert sorted(log.name for log in (tmp_path / "log").glob("worker_*")) == [
        f"worker_{rank}.log" for rank in range(4)
    ]


@pytest.mark.launch
def test_what_every_worker_refuses_is_said_in_a_rank_s_words(write_run):
    job = launch(write_run("{tp: 2}", 2), "generate", "--set=engine.max_seq_len=9999", "--prompt=x")
    output, messages = job.communicate(timeout=100)
    assert (job.returncode, output) == (1, "")
    last = messages.splitlines()[-1]
    assert last.startswith("error: rank ") and "max_seq_len 9999 is longer than the model's 4096 positions" in last


@pytest.mark.launch
def test_a_killed_worker_ends_the_others_and_is_named(write_run, tmp_path):
    job = launch(write_run("{tp: 2}", 2), *LONG)
    log, deadline = tmp_path / "log" / "worker_0.log", time.monotonic() + 100
    while not (log.exists() and "copy bandwidth" in log.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.2)
    first = process_of(log)
    os.kill(process_of(tmp_path / "log" / "worker_1.log"), signal.SIGKILL)
    _, messages = job.communicate(timeout=100)
    assert job.returncode == 1
    assert messages.splitlines()[-1].startswith("error: rank 1 failed")
    assert not is_alive(first)


@pytest.mark.launch
def test_an_interrupt_ends_every_worker(write_run, tmp_path):
    job = launch(write_run("{tp: 2}", 2), *LONG)
    logs, deadline = [tmp_path / "log" / f"worker_{rank}.log" for rank in range(2)], time.monotonic() + 100
    while not (logs[0].exists() and "copy bandwidth" in logs[0].read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.2)
    workers = [process_of(log) for log in logs]
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) != 0
    assert not any(map(is_alive, workers))


@pytest.mark.launch
def test_a_node_that_never_starts_ends_in_a_time_out(write_run):
    job = launch(write_run("{tp: 2}", 1, nodes=2, timeout=5), *GENERATE, flags=["--node-rank", "0"])
    _, messages = job.communicate(timeout=100)
    assert job.returncode == 1
    assert messages.splitlines()[-1].startswith("error: ")
