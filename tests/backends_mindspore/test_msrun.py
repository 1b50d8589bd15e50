"""Several workers under msrun: the tokens of a single process, on one node and on four; what a failure ends in."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspan.models.sums import held_out_sums
from deepspan.scripts.runtime import open_run, read_run
from deepspan.serving.batch import complete
from tests.launches import free_port, launch, token_ids

pytest.importorskip("mindspore", reason="mindspore is not installed")
pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["请介绍一下北京的景点", *(prompt for prompt, _ in held_out_sums(4, seed=3))]
TOKENS = 24
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def single():
    """Greedy token ids of every prompt in one process."""
    with open_run(read_run("demo_mindspore_cpu")) as session:
        prompts = [session.tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        return [
            c.token_ids for c in complete(session.engine, prompts, session.generation_options(max_new_tokens=TOKENS))
        ]


def write_run(folder, tp, nodes=1, timeout=120, ep=1, dp=1):
    """The run of the embedded model over ``tp`` times ``dp`` workers, as a YAML."""
    path = folder / "run.yaml"
    path.write_text(
        f"""
model: {{spec: demo}}
backend: mindspore_ascend
device: cpu
dtype: fp32
parallel: {{tp: {tp}, ep: {ep}, dp: {dp}}}
engine: {{max_batch: 8, max_seq_len: 256}}
sampling: {{temperature: 0}}
launch: {{launcher: msrun, nodes: {nodes}, procs_per_node: {tp * dp // nodes}, master_port: {free_port()},
         log_dir: {folder / "log"}, timeout: {timeout}, env: {{OMP_NUM_THREADS: "1"}}}}
"""
    )
    return path


def generate_arguments():
    return ["generate", "--json", "--max-new-tokens", str(TOKENS), *(f"--prompt={prompt}" for prompt in PROMPTS)]


@pytest.mark.parametrize(("tp", "ep", "dp"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (1, 2, 2), (1, 1, 2), (2, 4, 2)])
def test_several_workers_give_the_tokens_of_one(single, tmp_path, tp, ep, dp):
    job = launch(write_run(tmp_path, tp, ep=ep, dp=dp), *generate_arguments())
    output, messages = job.communicate(timeout=400)
    assert job.returncode == 0, messages
    assert token_ids(output) == single
    assert "DISTRIBUTED" not in messages, "the framework's own lines stay in the log"


def test_tokens_sent_to_the_ranks_of_their_experts_come_back_as_sums(tmp_path):
    settings = ["--worker_num=3", "--local_worker_num=3", f"--master_port={free_port()}", f"--log_dir={tmp_path}"]
    script = ROOT / "tests" / "backends_mindspore" / "dispatch_ranks.py"
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [BIN / "msrun", *settings, "--join=True", "--cluster_time_out=120", script]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    logs = [(tmp_path / f"worker_{rank}.log").read_text() for rank in range(3)]
    assert job.returncode == 0, job.stdout + logs[0][-2000:]
    assert all(f"rank {rank} has the sums" in log for rank, log in enumerate(logs))


def test_what_every_worker_refuses_is_said_once(tmp_path):
    job = launch(write_run(tmp_path, tp=2), "generate", "--set=engine.max_seq_len=9999", "--prompt=x")
    output, messages = job.communicate(timeout=200)
    assert job.returncode == 1 and not output
    last = messages.splitlines()[-1]
    assert last.startswith("error: rank ") and "max_seq_len 9999 is longer than the model's 4096 positions" in last


def test_a_killed_worker_ends_the_others_and_is_named(tmp_path):
    job = launch(write_run(tmp_path, tp=2), "eval", "--task=sums")
    log, deadline = tmp_path / "log" / "worker_0.log", time.monotonic() + 200
    while not (log.exists() and "evaluating" in log.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.5)
    victim = int((tmp_path / "log" / "worker_1.log").read_text().split("rank 1 is process ")[1].split()[0])
    os.kill(victim, signal.SIGKILL)
    _, messages = job.communicate(timeout=120)
    assert job.returncode == 1
    assert messages.splitlines()[-1].startswith("error: rank 1 failed")
    first = int(log.read_text().split("rank 0 is process ")[1].split()[0])
    assert not Path(f"/proc/{first}").exists()


def test_a_node_that_never_starts_ends_in_a_time_out(tmp_path):
    path = write_run(tmp_path, tp=2, nodes=2, timeout=10)
    job = launch(path, *generate_arguments(), flags=["--node-rank", "0"])
    _, messages = job.communicate(timeout=200)
    assert job.returncode == 1
    assert messages.splitlines()[-1].startswith("error: ")


@contextlib.contextmanager
def four_hosts():
    """Network namespaces on one bridge: their names, the first with the address 10.77.0.1."""
    names, bridge = [f"deepspan{os.getpid()}-{i}" for i in range(4)], f"dsb{os.getpid()}"[:15]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            outer = f"{bridge[:12]}v{i}"
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outer, "master", bridge, "up")
            for command in (("addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                ip("-n", name, *command)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def can_make_hosts():
    if not shutil.which("ip") or os.geteuid() != 0:
        return False
    name = f"deepspan-probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_make_hosts(), reason="network namespaces need root and iproute2")
def test_four_nodes_started_by_the_launcher_script_give_the_tokens_of_one(single, tmp_path):
    path = write_run(tmp_path, tp=4, nodes=4)
    worker = ["python", "-m", "deepspan.scripts.worker", *_with_run(path, generate_arguments())]
    command = shlex.join(worker)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with four_hosts() as hosts:
        port = str(free_port())
        jobs = []
        for rank, host in enumerate(hosts):
            log_dir = str(tmp_path / f"node{rank}")
            script = ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"), command]
            settings = ["4", "1", "10.77.0.1", port, str(rank), log_dir, "True", "120"]
            with (tmp_path / f"node{rank}.txt").open("w") as said:
                jobs.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host, *script, *settings], env=environment, stdout=said, stderr=said
                    )
                )
        codes = [job.wait(timeout=600) for job in jobs]
    assert codes == [0, 0, 0, 0], (tmp_path / "node0.txt").read_text()[-3000:]
    assert token_ids((tmp_path / "node0" / "worker_0.log").read_text()) == single


def _with_run(path, arguments):
    return [arguments[0], str(path), *arguments[1:]]
