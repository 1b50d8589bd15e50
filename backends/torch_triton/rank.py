"""This process among those that torchrun started."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.sharding import Grid
from .control import Control, connect
from .device import choose_device, collectives
from .parallel import ALONE, Mesh, make_mesh


@dataclass(frozen=True)
class TorchRank:
    """One worker of torchrun, or the only process. ``local_ranks`` processes share this machine."""

    mesh: Mesh = ALONE
    local_ranks: int = 1
    _control: Control | None = None

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def world_size(self) -> int:
        return self.mesh.grid.world_size

    def broadcast(self, array: NDArray) -> NDArray:
        if self._control is None:
            return array
        content = np.array(array, order="C")
        self._control.broadcast(content.reshape(-1).view(np.uint8))
        return content

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self._control is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self._control.every)
        return int(number)

    def barrier(self) -> None:
        if self._control is not None:
            dist.barrier(group=self._control.every)


def join(run: RunConfig) -> TorchRank:
    """The rank that torchrun's environment gives this process; a run without a launcher is a single process."""
    grid = Grid(**run.parallel.model_dump())
    if run.launch.launcher == "none":
        if grid.world_size > 1:
            what = f"{grid.world_size} ranks in one process"
            raise InputError(what, "parallel, launch.launcher", "set launcher: torchrun and start it with launch")
        return TorchRank()
    if run.launch.launcher != "torchrun":
        raise InputError(f"launcher {run.launch.launcher}", "launch.launcher", "torch_triton is started by torchrun")
    started = _started_ranks()
    if started != grid.world_size:
        what = f"tp {grid.tp} x dp {grid.dp} x pp {grid.pp} is {grid.world_size} and torchrun started {started} workers"
        raise InputError(what, "parallel", "make launch.nodes x launch.procs_per_node equal to it")
    timeout = timedelta(seconds=run.launch.timeout)
    if not dist.is_initialized():
        dist.init_process_group(collectives(choose_device(run)), timeout=timeout)
        atexit.register(dist.destroy_process_group)  # its threads must end before the interpreter does
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    return TorchRank(make_mesh(grid, timeout), local_ranks, connect(local_ranks))


def _started_ranks() -> int:
    if "RANK" not in os.environ or "LOCAL_WORLD_SIZE" not in os.environ:
        todo = "use deepspan launch RUN -- …"
        raise InputError("this process was not started by torchrun", "launch.launcher", todo)
    return int(os.environ["WORLD_SIZE"])
