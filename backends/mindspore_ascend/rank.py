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
from ..base import Rank, SingleProcess

_WORKERS = "MS_WORKER_NUM"  # set by msrun


class _Total(nn.Cell):
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.add = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.add(x)


class MsrunRank:
    """One worker of msrun; its collectives are MindSpore's, HCCL between NPUs and its own between CPUs."""

    def __init__(self) -> None:
        self.rank: int = get_rank()
        self.world_size: int = get_group_size()
        self._total = _Total()
        self._total.set_inputs(Tensor(shape=[None], dtype=ms.float32))

    def broadcast(self, array: NDArray) -> NDArray:
        """Rank 0's array on every rank.

        Its bytes travel as numbers, to which other ranks add zeros: a CPU's collectives are sums of FP32 values.
        """
        content = np.ascontiguousarray(array)
        numbers = content.reshape(-1).view(np.uint8).astype(np.float32)
        received: NDArray = self._total(Tensor(numbers if self.rank == 0 else np.zeros_like(numbers))).asnumpy()
        return received.astype(np.uint8).view(content.dtype).reshape(content.shape)

    def barrier(self) -> None:
        self.broadcast(np.zeros(1, np.uint8))


def join(run: RunConfig) -> Rank:
    """The rank that msrun's environment gives this process; a run without a launcher is a single process."""
    degree = run.parallel.tp
    others = {"dp": run.parallel.dp, "pp": run.parallel.pp}
    if large := [name for name, value in others.items() if value > 1]:
        raise InputError(f"parallel.{large[0]} above 1", "mindspore_ascend", "use parallel.tp and parallel.ep")
    if run.launch.launcher == "none":
        if degree > 1:
            raise InputError(f"tp {degree} in one process", "parallel.tp, launch.launcher", "set launcher: msrun")
        return SingleProcess()
    if run.launch.launcher != "msrun":
        raise InputError(f"launcher {run.launch.launcher}", "launch.launcher", "mindspore_ascend is started by msrun")
    if _WORKERS not in os.environ:
        raise InputError("this process was not started by msrun", "launch.launcher", "use deepspan launch RUN -- …")
    if int(os.environ[_WORKERS]) != degree:
        what = f"tp is {degree} and msrun started {os.environ[_WORKERS]} workers"
        raise InputError(what, "parallel.tp", "make launch.nodes x launch.procs_per_node equal to tp")
    init()
    return MsrunRank()
