"""The launcher's command line for a run, and the life of the job that it starts on this node."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..configs.schema import Launch, RunConfig
from ..models.errors import DeepspanError, InputError
from ..models.sharding import Grid
from .words import count
from .worker import LOG_NAME, LOGS, PROCESS_LINE, RESULTS

_WORKER = ("-m", "deepspan.scripts.worker")
_ERROR = "error: "
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10  # for a launcher to end the other workers itself
_FAILED = re.compile(r"Worker process (\d+) exit with exception|exitcode: -?\d+\).*?\(pid: (\d+)\)")
_RAISED = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception): .+)", re.MULTILINE)
_PROCESS = re.compile(re.escape(PROCESS_LINE).replace(r"\{rank\}", r"(\d+)").replace(r"\{pid\}", r"(\d+)"))
_FRAMEWORK_LINE = re.compile(r"\[(INFO|WARNING)\] \w+\(|rank \S+ is process ")


def check_ranks(run: RunConfig) -> Grid:
    """The run's degrees of parallelism, which must be as many ranks as its launcher starts processes."""
    grid, launch = Grid(**run.parallel.model_dump()), run.launch
    if launch.launcher != "none" and launch.nodes * launch.procs_per_node != grid.world_size:
        raise InputError(
            f"{count(launch.nodes, 'node')} of {launch.procs_per_node} processes for {grid.world_size} ranks",
            "launch",
            "make nodes x procs_per_node equal tp x dp x pp",
        )
    return grid


@dataclass(frozen=True)
class Node:
    """This machine's part of a job; ``node_rank`` 0 is the machine with ``launch.master_addr``."""

    launch: Launch
    node_rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.launch.nodes:
            raise InputError(
                f"node rank {self.node_rank} of {count(self.launch.nodes, 'node')}", "--node-rank", "count nodes from 0"
            )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What starts this node's workers, each of them running ``deepspan`` with ``arguments``."""
        if self.launch.launcher == "msrun":
            return [*self._msrun(), "python", *_WORKER, *arguments]
        if self.launch.launcher == "torchrun":
            return [*self._torchrun(), *_WORKER, *arguments]
        raise InputError("this run has no launcher", "launch.launcher", "set it to torchrun or msrun")

    def _msrun(self) -> list[str]:
        launch = self.launch
        options = {
            "worker_num": launch.nodes * launch.procs_per_node,
            "local_worker_num": launch.procs_per_node,
            "master_addr": launch.master_addr,
            "master_port": launch.master_port,
            "node_rank": self.node_rank,
            "log_dir": launch.log_dir,
            "join": launch.join,
            "cluster_time_out": launch.timeout,
            "tail_worker_log": launch.procs_per_node * launch.nodes,  # no worker: the logs are read here
        }
        return ["msrun", *(f"--{name}={value}" for name, value in options.items())]

    def _torchrun(self) -> list[str]:
        launch = self.launch
        options = {
            "nnodes": launch.nodes,
            "nproc-per-node": launch.procs_per_node,
            "master-addr": launch.master_addr,
            "master-port": launch.master_port,
            "node-rank": self.node_rank,
            "rdzv-conf": f"timeout={launch.timeout}",
        }
        return ["torchrun", *(f"--{name}={value}" for name, value in options.items())]

    def environment(self) -> dict[str, str]:
        """What is added to the environment: the run's ``launch.env``, and this Python's commands before others."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        return {"PATH": path, **self._framework_settings(), **self.launch.env}

    def _framework_settings(self) -> dict[str, str]:
        if self.launch.launcher == "msrun":
            return {"GLOG_v": "3"}
        threads = max(1, len(os.sched_getaffinity(0)) // self.launch.procs_per_node)  # torchrun's own choice is one
        return {LOGS: self.launch.log_dir, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}

    @property
    def first_log(self) -> Path:
        """Where the messages of this node's first worker go."""
        return Path(self.launch.log_dir) / LOG_NAME.format(rank=self.node_rank * self.launch.procs_per_node)


def run_node(node: Node, arguments: Sequence[str]) -> None:
    """Start this node's workers and stay until they end: rank 0's results on standard output, its messages on stderr.

    Raises DeepspanError that names the first rank that failed, when all others are ended too.
    """
    folder = Path(node.launch.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"launch.log_dir = {folder}"
        raise InputError(f"no folder for logs: {error.strerror}", where, "name another one") from None
    if node.node_rank == 0:
        _check_port(node.launch.master_port)
    with tempfile.NamedTemporaryFile(prefix="deepspan-results-") as results, (folder / "launcher.log").open("w") as log:
        environment = {**os.environ, **node.environment(), RESULTS: results.name}
        node.first_log.unlink(missing_ok=True)
        job = _start(node.command(arguments), environment, log)
        messages = _Follower(node.first_log, sys.stderr, _FRAMEWORK_LINE)
        streams = [_Follower(Path(results.name), sys.stdout), messages]
        try:
            code = _follow(job, streams, folder / "launcher.log")
        finally:
            _end(job)
    if code:
        raise _failure(folder, messages.withheld)
    messages.release()


def _check_port(port: int) -> None:
    """The first node listens here; launchers say so in pages of their own, after a while."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            where = f"launch.master_port = {port}"
            raise InputError(f"cannot listen: {error.strerror}", where, "set a port that is free") from None


def _start(command: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    except FileNotFoundError:
        package = {"msrun": "mindspore", "torchrun": "torch"}[command[0]]
        raise InputError(f"no command {command[0]}", "launch.launcher", f"install {package} on this node") from None


class _Follower:
    """Copies whole lines of a growing file, from its beginning, but those that match ``hidden``.

    Of messages, an error at the end is ``withheld``: when the job failed, the launcher's one line says what it says.
    """

    def __init__(self, file: Path, target: IO[str], hidden: re.Pattern[str] | None = None):
        self._file = file
        self._target = target
        self._hidden = hidden
        self._done = 0
        self.withheld = ""

    def copy(self, rest: bool = False) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as source:
            source.seek(self._done)
            new = source.read()
        if self._hidden is not None and not rest:
            new = new[: new.rfind(b"\n") + 1]  # a line is shown or hidden as a whole
        complete = _whole_characters(new)
        self._done += len(complete)
        for line in complete.decode("utf-8", "replace").splitlines(keepends=True):
            if self._hidden is None or not self._hidden.match(line):
                self.release()
                if self._hidden is not None and line.startswith(_ERROR):
                    self.withheld = line
                else:
                    self._target.write(line)
        self._target.flush()

    def release(self) -> None:
        """Write what was withheld."""
        self._target.write(self.withheld)
        self.withheld = ""


def _whole_characters(content: bytes) -> bytes:
    """``content`` without a UTF-8 character whose end is not written yet."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            wanted = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return content if back >= wanted else content[:-back]
        if byte < 0x80:
            break
    return content


def _follow(job: subprocess.Popen[bytes], streams: Sequence[_Follower], log: Path) -> int:
    """The job's exit code. One that reported a failed worker and does not end by itself has failed."""
    failed_at: float | None = None
    while (code := job.poll()) is None:
        for stream in streams:
            stream.copy()
        if failed_at is None and _FAILED.search(log.read_text(encoding="utf-8", errors="replace")):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
            code = 1
            break
        time.sleep(_POLL_SECONDS)
    for stream in streams:
        stream.copy(rest=True)
    return code


def _end(job: subprocess.Popen[bytes]) -> None:
    """End what is left of the job: an interrupt lets the launcher end its workers."""
    if job.poll() is not None:
        return
    os.killpg(job.pid, signal.SIGINT)
    try:
        job.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _failure(folder: Path, withheld: str) -> DeepspanError:
    """The error of the rank that failed first, in its own words when it left some.

    When the launcher does not tell which one that was, ``withheld``, the words of this node's first rank, or the
    launcher's own have to do.
    """
    report = folder / "launcher.log"
    text = report.read_text(encoding="utf-8", errors="replace")
    found = _FAILED.search(text)
    pid = (found[1] or found[2]) if found else None
    for log in sorted(folder.glob("*.log")):
        content = log.read_text(encoding="utf-8", errors="replace")
        rank = next((rank for rank, process in _PROCESS.findall(content) if process == pid), None)
        if rank is not None:
            said = [line.removeprefix(_ERROR) for line in content.splitlines() if line.startswith(_ERROR)]
            return DeepspanError(f"rank {rank} failed", str(log), said[-1] if said else "it was ended from outside")
    raised = _RAISED.findall(text)[-1:]
    said_last = withheld.removeprefix(_ERROR) or "".join(raised) or "read its last lines"
    return DeepspanError("the launcher failed", str(report), said_last)
