"""This process among those that msrun started, and the collectives between them."""

from __future__ import annotations

import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init
from numpy.typing import NDArray

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.sharding import Grid
from .mesh import ALONE, Mesh, make_mesh

_WORKERS = "MS_WORKER_NUM"  # set by msrun


class _Total(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.add = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.add(x)


class MindSporeRank:
    """The only process, or one worker of msrun; collectives are the framework's."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._total = _Total()
        self._total.set_inputs(Tensor(shape=[None], dtype=ms.float32))

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def world_size(self) -> int:
        return self.mesh.grid.world_size

    def broadcast(self, array: NDArray) -> NDArray:
        """Rank 0's array on every rank."""
        return self.joined(array if self.rank == 0 else np.zeros_like(array))

    def joined(self, array: NDArray) -> NDArray:
        """What the ranks' arrays say together: a value is not zero on one rank at most, which all ranks get.

        Bytes travel as numbers, to which other ranks add zeros: a CPU's collectives are sums of FP32 values.
        """
        if self.world_size == 1:
            return array
        content = np.ascontiguousarray(array)
        numbers = content.reshape(-1).view(np.uint8).astype(np.float32)
        received: NDArray = self._total(Tensor(numbers)).asnumpy()
        return received.astype(np.uint8).view(content.dtype).reshape(content.shape)

    def barrier(self) -> None:
        self.broadcast(np.zeros(1, np.uint8))


def join(run: RunConfig) -> MindSporeRank:
    """The rank that msrun's environment gives this process; a run without a launcher is a single process."""
    if run.parallel.pp > 1:
        todo = "use parallel.tp, ep and dp; layers on several stages are for models that do not fit otherwise"
        raise InputError(f"pp {run.parallel.pp} on mindspore_ascend", "parallel.pp", todo)
    grid = Grid(**run.parallel.model_dump())
    if run.launch.launcher == "none":
        if grid.world_size > 1:
            what = f"{grid.world_size} ranks in one process"
            raise InputError(what, "parallel, launch.launcher", "set launcher: msrun and start it with launch")
        return MindSporeRank(ALONE)
    if run.launch.launcher != "msrun":
        raise InputError(f"launcher {run.launch.launcher}", "launch.launcher", "mindspore_ascend is started by msrun")
    if _WORKERS not in os.environ:
        raise InputError("this process was not started by msrun", "launch.launcher", "use deepspan launch RUN -- …")
    if int(os.environ[_WORKERS]) != grid.world_size:
        what = f"tp {grid.tp} x dp {grid.dp} is {grid.world_size} and msrun started {os.environ[_WORKERS]} workers"
        raise InputError(what, "parallel", "make launch.nodes x launch.procs_per_node equal to it")
    init()
    assert get_group_size() == grid.world_size, "msrun's environment says so"
    return MindSporeRank(make_mesh(grid, get_rank()))
