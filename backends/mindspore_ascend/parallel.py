"""Tensor parallelism inside the network: sums and joins over the ranks, which vanish when there is one."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn, ops


class SumOverRanks(nn.Cell):
    """The sum of every rank's tensor, on every rank."""

    def __init__(self, ranks: int):
        super().__init__(auto_prefix=False)
        self.ranks = ranks
        self.add: Any = ops.AllReduce() if ranks > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return x
        return self.add(x)


class JoinColumns(nn.Cell):
    """Every rank's columns beside each other: [O, V / ranks] to [O, V]."""

    def __init__(self, ranks: int):
        super().__init__(auto_prefix=False)
        self.ranks = ranks
        self.gather: Any = ops.AllGather() if ranks > 1 else None

    def construct(self, x_OV: Tensor) -> Tensor:
        if self.ranks == 1:
            return x_OV
        each_ROV = self.gather(x_OV).reshape(self.ranks, -1, x_OV.shape[1])
        return each_ROV.transpose(1, 0, 2).reshape(-1, self.ranks * x_OV.shape[1])
