"""`deepspan launch` as its own process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def launch(path, *command, flags=()):
    """Start the workers of one node; the job's output and messages are pipes."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    arguments = [sys.executable, "-m", "deepspan.scripts.cli", "launch", str(path), *flags, "--", *command]
    return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def token_ids(output):
    """Of ``generate --json``, prompt by prompt."""
    return [json.loads(line)["token_ids"] for line in output.splitlines() if line.startswith("{")]
