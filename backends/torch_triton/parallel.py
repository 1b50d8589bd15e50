"""Which ranks work together on what, and the collectives between them.

A mesh is `models.sharding.Grid` seen from one rank: the tensor-parallel ranks that hold parts of the same matrices, the
data-parallel replicas whose tokens meet in the experts, and the pipeline's stages.

Shape letters: W ranks of a group, R rows of this rank, S rows of all ranks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...models.sharding import Grid, Position

if TYPE_CHECKING:
    from .kernels.peers import Peers


class Group:
    """Ranks in the order of the parts that they hold. Every rank calls the same methods in the same order.

    On CPUs, sums are taken in FP32 in the order of the ranks and rounded once, so that a row has the same bits on every
    rank and in any batch. Everything goes through one exchange, each rank with each: gloo's own gather and reduction go
    round a ring, whose steps cost more than the bytes.
    """

    peers: Peers | None = None  # of GPUs that reach each other's memory, for what kernels send each other

    def __init__(self, ranks: Sequence[int] = (0,), rank: int = 0, handle: dist.ProcessGroup | None = None):
        self.ranks = ranks
        self.size = len(ranks)
        self.index = ranks.index(rank)
        self.handle = handle

    def total(self, x: Tensor) -> Tensor:
        """The sum of the ranks' ``x``, on every rank. On a GPU, ``x`` itself becomes the sum."""
        if self.size == 1:
            return x
        if x.device.type != "cpu":
            dist.all_reduce(x, group=self.handle)
            return x
        return ordered_sum(self._exchange(x.expand(self.size, *x.shape))).to(x.dtype)

    def beside(self, x: Tensor) -> Tensor:
        """The ranks' matrices beside each other, joined along the last axis."""
        if self.size == 1:
            return x
        return torch.cat(self._exchange(x.expand(self.size, *x.shape)).unbind(), dim=-1)

    def below(self, x: Tensor, counts: list[int]) -> Tensor:
        """The ranks' rows one below the other, [R, …] to [S, …]; ``counts`` says how many rows each rank has.

        On GPUs, here and in `own_total`, as many as every other.
        """
        if self.size == 1:
            return x
        if x.device.type != "cpu":
            room = x.new_empty(self.size * len(x), *x.shape[1:])
            dist.all_gather_into_tensor(room, x.contiguous(), group=self.handle)
            return room
        return self._exchange(x.repeat(self.size, *[1] * (x.dim() - 1)), [len(x)] * self.size, counts)

    def own_total(self, x: Tensor, counts: list[int]) -> Tensor:
        """This rank's rows of the sum of the ranks' ``x``, [S, …] to [R, …]: `below` the other way round."""
        if self.size == 1:
            return x
        own = counts[self.index]
        if x.device.type != "cpu":
            room = x.new_empty(own, *x.shape[1:])
            dist.reduce_scatter_tensor(room, x.contiguous(), group=self.handle)
            return room
        parts = self._exchange(x, counts, [own] * self.size).unflatten(0, (self.size, own))
        return ordered_sum(parts).to(x.dtype)

    def send_on(self, x: Tensor) -> None:
        """Hand ``x`` to the next rank."""
        dist.send(x.contiguous(), self.ranks[self.index + 1], group=self.handle)

    def receive(self, room: Tensor) -> Tensor:
        """What the previous rank sends, in ``room``."""
        dist.recv(room, self.ranks[self.index - 1], group=self.handle)
        return room

    def from_last(self, x: Tensor) -> Tensor:
        """The last rank's ``x``, written into that of every rank."""
        if self.size > 1:
            dist.broadcast(x, self.ranks[-1], group=self.handle)
        return x

    def _exchange(self, x: Tensor, counts: list[int] | None = None, received: list[int] | None = None) -> Tensor:
        """Part i of ``x`` goes to rank i; the parts that come, by rank. Parts are equal, or ``counts`` rows long."""
        room = torch.empty_like(x) if received is None else x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(room, x.contiguous(), received, counts, group=self.handle)
        return room


def ordered_sum(parts: Tensor) -> Tensor:
    """In FP32, from the first part to the last."""
    return reduce(torch.add, parts.float().unbind())


@dataclass(frozen=True)
class Mesh:
    """This rank's place in ``grid`` and its groups."""

    grid: Grid
    rank: int
    tp: Group
    dp: Group  # replicas, at the same tensor index
    pp: Group  # stages, at the same place in the stage

    @cached_property
    def position(self) -> Position:
        return self.grid.position(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.pp.index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.index == self.pp.size - 1


ALONE = Mesh(Grid(), 0, Group(), Group(), Group())


def make_mesh(grid: Grid, timeout: timedelta) -> Mesh:
    """The mesh of this rank; all ranks of the job, which are as many as the grid has, make it together."""
    rank = dist.get_rank()
    ranks = np.arange(grid.world_size).reshape(grid.pp, grid.dp, grid.tp)

    def group(axis: int) -> Group:
        """This rank's among the groups along an axis. Every rank makes all of them: torch wants it so."""
        mine = Group((rank,), rank)
        for members in np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis]).tolist():
            handle = dist.new_group(members, timeout) if len(members) > 1 else None
            if rank in members:
                mine = Group(members, rank, handle)
        return mine

    return Mesh(grid, rank, tp=group(2), dp=group(1), pp=group(0))
