"""Sums and joins over the ranks inside the network, which vanish where there is one rank.

Shape letters: T tokens of this replica, P rows that every replica gives, Q those of them that a rank gives, S = P rows
of all replicas, D hidden, O rows, V vocabulary, R ranks.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .mesh import Group
from .ops import OpSet


class SumOverRanks(nn.Cell):
    """The sum of every rank's tensor, on every rank."""

    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.ranks = group.size
        self.add: Any = ops.AllReduce(group=group.name) if group.size > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return x
        return self.add(x)


class JoinColumns(nn.Cell):
    """Every rank's columns beside each other: [O, V / ranks] to [O, V]."""

    def __init__(self, op_set: OpSet, group: Group):
        super().__init__(auto_prefix=False)
        self.ranks = group.size
        self.gather: Any = op_set.AllGather(group) if group.size > 1 else None

    def construct(self, x_OV: Tensor) -> Tensor:
        if self.ranks == 1:
            return x_OV
        each_ROV = self.gather(x_OV).reshape(self.ranks, -1, x_OV.shape[1])
        return each_ROV.transpose(1, 0, 2).reshape(-1, self.ranks * x_OV.shape[1])


class JoinReplicas(nn.Cell):
    """The rows [S, D] of all data-parallel replicas, one replica's below the other's.

    A collective gives every rank the same room: ``spread_P`` names the row to send in each of P places, those of the
    replica first.
    """

    def __init__(self, op_set: OpSet, replicas: Group):
        super().__init__(auto_prefix=False)
        self.replicas = replicas.size
        self.gather: Any = op_set.AllGather(replicas) if replicas.size > 1 else None

    def construct(self, x_TD: Tensor, spread_P: Tensor | None) -> Tensor:
        if self.replicas == 1:
            return x_TD
        return self.gather(ops.gather(x_TD, spread_P, 0))


class OwnSum(nn.Cell):
    """`JoinReplicas` the other way round: this replica's rows [T, D] of the sum of the replicas' [S, D]."""

    def __init__(self, op_set: OpSet, replicas: Group):
        super().__init__(auto_prefix=False)
        self.replicas = replicas.size
        self.scatter: Any = op_set.ReduceScatter(replicas) if replicas.size > 1 else None

    def construct(self, y_SD: Tensor, like_TD: Tensor) -> Tensor:
        """``like_TD`` has as many rows as the replica has tokens."""
        if self.replicas == 1:
            return y_SD
        return self.scatter(y_SD)[: like_TD.shape[0]]


class OwnRows(nn.Cell):
    """The rows that this rank sends to experts: its part of the P places, which the ranks of a replica share."""

    def __init__(self, ranks: Group):
        super().__init__(auto_prefix=False)
        self.ranks, self.index = ranks.size, ranks.index

    def construct(self, x_TD: Tensor, spread_P: Tensor) -> Tensor:
        return ops.gather(x_TD, spread_P.reshape(self.ranks, -1)[self.index], 0)


class InPlace(nn.Cell):
    """`OwnRows` the other way round: this rank's rows in their places of [T, D], zeros in the others'."""

    def __init__(self, ranks: Group):
        super().__init__(auto_prefix=False)
        self.ranks = ranks.size
        self.place_R11 = Tensor(np.eye(ranks.size, dtype=np.float32)[ranks.index].reshape(-1, 1, 1))

    def construct(self, y_QD: Tensor, like_TD: Tensor) -> Tensor:
        """FP32; ``like_TD`` has as many rows as the replica has tokens."""
        placed_RQD = y_QD.astype(ms.float32).expand_dims(0) * self.place_R11
        return placed_RQD.reshape(-1, y_QD.shape[1])[: like_TD.shape[0]]
