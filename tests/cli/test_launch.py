"""``deepspan launch``: the launcher's command line; and msrun_launcher.sh's positional forms."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deepspan.configs.schema import Launch
from deepspan.models.errors import DeepspanError, InputError
from deepspan.scripts.cli import main
from deepspan.scripts.launching import Node, run_node
from tests.launches import free_port

ROOT = Path(__file__).resolve().parents[2]
RUN = """
model: {spec: deepseek_v3, weights: random}
backend: mindspore_ascend
parallel: {tp: 32}
launch: {launcher: LAUNCHER, nodes: 4, procs_per_node: 8, master_addr: 192.0.2.1, master_port: 8888, timeout: 90,
         log_dir: logs, env: {HCCL_OP_EXPANSION_MODE: AIV}}
"""


@pytest.fixture
def run_file(tmp_path):
    def write(launcher):
        path = tmp_path / "run.yaml"
        path.write_text(RUN.replace("LAUNCHER", launcher))
        return str(path)

    return write


def dry_run(capsys, *arguments):
    assert main(["launch", *arguments[:-1], "--dry-run", "--", *arguments[-1]]) == 0
    return shlex.split(capsys.readouterr().out)


def test_msrun_gets_the_run_s_settings_and_the_worker_the_command(run_file, capsys):
    path = run_file("msrun")
    words = dry_run(capsys, path, "--node-rank", "2", "--set", "engine.max_batch=4", ["generate", "--prompt", "a b"])
    assert words[:2] == ["HCCL_OP_EXPANSION_MODE=AIV", "msrun"]
    assert set(words[2:11]) == {
        "--worker_num=32", "--local_worker_num=8", "--master_addr=192.0.2.1", "--master_port=8888", "--node_rank=2",
        "--log_dir=logs", "--join=True", "--cluster_time_out=90", "--tail_worker_log=32",
    }  # fmt: skip
    worker = ["python", "-m", "deepspan.scripts.worker"]
    assert words[11:] == [*worker, "generate", path, "--set=engine.max_batch=4", "--prompt", "a b"]


def test_torchrun(run_file, capsys):
    path = run_file("torchrun")
    words = dry_run(capsys, path, "--node-rank", "0", "--master-addr", "192.0.2.9", ["eval", path, "--task", "sums"])
    assert words[1] == "torchrun"
    assert {"--nnodes=4", "--nproc-per-node=8", "--master-addr=192.0.2.9", "--node-rank=0"} <= set(words)
    assert words[-6:] == ["-m", "deepspan.scripts.worker", "eval", path, "--task", "sums"]


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ("none", ["--node-rank", "0"], "this run has no launcher"),
        ("msrun", [], "one of 4 nodes: --node-rank"),
        ("msrun", ["--node-rank", "4"], "node rank 4 of 4 nodes"),
        ("torchrun", ["--node-rank=0", "--set=parallel.tp=16"], "4 nodes of 8 processes for 16 ranks: launch"),
        (
            "torchrun",
            ["--node-rank=0", "--set=parallel.tp=3", "--set=launch.nodes=1", "--set=launch.procs_per_node=3"],
            "parallel.tp = 3 does not divide num_attention_heads = 128",
        ),
    ],
)
def test_wrong_use(run_file, capsys, launcher, flags, message):
    assert main(["launch", run_file(launcher), *flags, "--dry-run", "--", "generate"]) == 2
    assert message in capsys.readouterr().err


def test_workers_need_a_command(run_file, capsys):
    assert main(["launch", run_file("torchrun"), "--node-rank=0"]) == 2
    assert "no command for the workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["doctor"], "doctor is no command for several processes: deepspan launch: choose from generate, "),
        (["generate", "--promt", "x"], "unrecognized arguments: --promt x: deepspan generate: "),
    ],
)
def test_workers_are_not_started_with_a_command_that_none_understands(run_file, capsys, command, message):
    assert main(["launch", run_file("torchrun"), "--node-rank=0", "--", *command]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_log_folder_that_is_none_are_found_first(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        launch = Launch(launcher="torchrun", log_dir=str(tmp_path / "log"), master_port=port)
        with pytest.raises(InputError, match=f"cannot listen: Address already in use: launch.master_port = {port}"):
            run_node(Node(launch, 0), ["generate"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder for logs: File exists: launch.log_dir = "):
        run_node(Node(launch.model_copy(update={"log_dir": str(tmp_path / "file")}), 0), ["generate"])


def test_a_missing_launcher_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    node = Node(Launch(launcher="msrun", log_dir=str(tmp_path / "log"), env={"PATH": str(tmp_path)}), 0)
    with pytest.raises(InputError, match="no command msrun.*install mindspore"):
        run_node(node, ["doctor"])


@pytest.fixture
def fake_launcher(tmp_path, monkeypatch):
    """A command named torchrun that runs the given shell lines in place of workers."""

    def install(lines):
        script = tmp_path / "torchrun"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return Node(
            Launch(launcher="torchrun", log_dir=str(tmp_path / "log"), master_port=free_port(), env={"PATH": path}), 0
        )

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return install


def test_results_of_rank_0_come_out_and_messages_of_others_do_not(fake_launcher, capsys):
    worker = f"{sys.executable} -m deepspan.scripts.worker inspect demo --json"
    run_node(fake_launcher(f"RANK=1 {worker} && RANK=0 {worker}"), ["inspect"])
    output = capsys.readouterr().out
    assert output.count('"parameters"') == 1


def test_the_failed_rank_is_named_with_its_own_words(fake_launcher):
    worker = f"RANK=3 {sys.executable} -m deepspan.scripts.worker inspect nothing"
    lines = f'{worker} & pid=$!; wait $pid; echo "failed (exitcode: 2) local_rank: 3 (pid: $pid)"; exit 1'
    with pytest.raises(DeepspanError, match="rank 3 failed.*nothing"):
        run_node(fake_launcher(lines), ["inspect"])


def test_a_launcher_that_fails_itself_is_quoted(fake_launcher):
    lines = "echo 'Traceback'; echo 'torch.distributed.DistStoreError: 1/2 clients joined.'; exit 1"
    with pytest.raises(DeepspanError, match="the launcher failed: .*launcher.log: DistStoreError: 1/2 clients joined"):
        run_node(fake_launcher(lines), ["inspect"])


@pytest.fixture
def script(tmp_path):
    """Runs msrun_launcher.sh with a command named msrun that prints its arguments, one a line."""
    fake = tmp_path / "msrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def call(*arguments):
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return call


WORDS = ["run.py", "--input", "two words"]
COMMAND = "run.py --input 'two words'"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["8", "8", "8118", "output/msrun_log", "False", "7200"]),
        (["4"], ["4", "4", "8118", "output/msrun_log", "False", "7200"]),
        (["4", "9000", "logs", "True", "60"], ["4", "4", "9000", "logs", "True", "60"]),
        (["16", "8", "192.0.2.1", "9000", "1", "logs", "True", "60"], ["16", "8", "9000", "logs", "True", "60"]),
        (["8", "8", "192.0.2.1", "9000", "1", "logs", "True", "60"], ["8", "8", "9000", "logs", "True", "60"]),
    ],
)
def test_positional_forms(script, arguments, wanted):
    result = script(COMMAND, *arguments)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    names = ("worker_num", "local_worker_num", "master_port", "log_dir", "join", "cluster_time_out")
    options = [f"--{name}={value}" for name, value in zip(names, wanted, strict=True)]
    if wanted[0] != wanted[1]:
        options += ["--master_addr=192.0.2.1", "--node_rank=1"]
    assert lines == [*options, *WORDS]


@pytest.mark.parametrize("arguments", [[], [COMMAND, "4", "9000"], [COMMAND, "four"]])
def test_other_forms_end_with_1(script, arguments):
    result = script(*arguments)
    assert result.returncode == 1 and result.stderr and not result.stdout


def test_a_missing_msrun_is_named(tmp_path):
    command = ["/bin/bash", str(ROOT / "scripts" / "msrun_launcher.sh"), COMMAND]
    for name in ("dirname", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no command msrun: PATH: install mindspore on this node\n"


def test_one_worker_is_not_launched(script):
    result = script(COMMAND, "1")
    assert result.returncode == 0 and result.stdout.endswith(f"python {COMMAND}\n")
