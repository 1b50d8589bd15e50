"""What `deepspan launch` starts on every rank: a command, whose results come from rank 0 alone.

Rank 0 writes its standard output to the file that the launcher reads; the standard output of other ranks, and of
msrun's scheduler, goes where their messages go: to a log for each rank, which msrun makes itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .cli import main

RESULTS = "DEEPSPAN_RESULTS"  # environment variables: the file,
LOGS = "DEEPSPAN_LOGS"  # and the folder for logs, when the launcher keeps none
LOG_NAME = "worker_{rank}.log"  # as msrun names them
PROCESS_LINE = "rank {rank} is process {pid}"  # said first, so that the launcher can tell whose process failed


def _rank() -> int | None:
    """This process's rank by torchrun's or msrun's environment; None for msrun's scheduler."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return None
    return int(os.environ.get("RANK_ID", os.environ.get("RANK", "0")))


def work() -> int:
    rank = _rank()
    if logs := os.environ.get(LOGS):
        log_file = Path(logs) / LOG_NAME.format(rank=rank)
        log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        os.dup2(log, sys.stderr.fileno())
    print(PROCESS_LINE.format(rank=rank, pid=os.getpid()), file=sys.stderr, flush=True)
    results = os.environ.get(RESULTS)
    if rank == 0 and results:
        descriptor = os.open(results, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, sys.stdout.fileno())
    else:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return main()


if __name__ == "__main__":
    sys.exit(work())
