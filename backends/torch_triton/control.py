"""What rank 0 tells the other processes: over the network to one of each machine, and from there through sockets.

Every decode step is told, and short ones take hardly longer than gloo does for so few bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from tempfile import gettempdir

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...models.errors import DeepspanError

_PATIENCE = timedelta(days=365)  # between two steps lies whatever a user does


@dataclass(frozen=True)
class Control:
    """One process's ends. ``every``: all ranks, for what they tell each other."""

    every: dist.ProcessGroup
    firsts: dist.ProcessGroup | None = None  # of the first process of each of several machines: those
    source: Connection | None = None  # from the first process of this machine
    others: list[Connection] = field(default_factory=list)  # of the first process: to those of this machine

    def broadcast(self, content: NDArray) -> None:
        """Rank 0's ``content``, bytes, into that of every process; all have as much room."""
        if self.firsts is not None:
            dist.broadcast(torch.from_numpy(content), 0, group=self.firsts)
        try:
            for other in self.others:
                other.send_bytes(content.data)
            if self.source is not None:
                self.source.recv_bytes_into(content)
        except (EOFError, ConnectionError):
            what = "another process of this machine has ended"
            raise DeepspanError(what, f"rank {dist.get_rank()}", "see its messages") from None


def connect(local_ranks: int) -> Control:
    """All processes of the job, ``local_ranks`` on each machine, call this together."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    every = dist.new_group(backend="gloo", timeout=_PATIENCE)
    first_ranks = list(range(0, ranks, local_ranks))
    firsts = dist.new_group(first_ranks, _PATIENCE, backend="gloo") if len(first_ranks) > 1 else None
    first = rank - rank % local_ranks
    listener = _listener(local_ranks) if rank == first else None
    addresses = [""] * ranks
    dist.all_gather_object(addresses, "" if listener is None else str(listener.address), group=every)
    if listener is None:
        return Control(every, source=Client(addresses[first]))
    with listener:
        return Control(every, firsts, others=[listener.accept() for _ in range(local_ranks - 1)])


def _listener(backlog: int) -> Listener:
    try:
        return Listener(family="AF_UNIX", backlog=backlog)
    except OSError as error:
        todo = "set TMPDIR to a short path on this machine that can be written to"
        raise DeepspanError(f"no socket for this machine's processes: {error}", gettempdir(), todo) from None
