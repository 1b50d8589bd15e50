"""Which ranks work together on what: `models.sharding.Grid` seen from one rank of msrun."""

from __future__ import annotations

from dataclasses import dataclass

from mindspore.communication import GlobalComm, create_group

from ...models.sharding import Grid


@dataclass(frozen=True)
class Group:
    """Ranks in the order of the parts that they hold: how many, this rank's place, the framework's name for them."""

    size: int = 1
    index: int = 0
    name: str = GlobalComm.WORLD_COMM_GROUP


@dataclass(frozen=True)
class Mesh:
    """This rank's place in ``grid``: the ranks that share its matrices, and the replicas at its tensor index.

    ``ep`` are the ranks that tokens are sent between, to where their experts are; a group of its own, because the
    operators that send allow no others there.
    """

    grid: Grid
    rank: int
    tp: Group
    dp: Group
    ep: Group | None = None


ALONE = Mesh(Grid(), 0, Group(), Group())


def make_mesh(grid: Grid, rank: int) -> Mesh:
    """The mesh of this rank; every rank of the job makes its own, after the job has been joined."""
    place = grid.position(rank)
    first = place.dp * grid.tp
    return Mesh(
        grid,
        rank,
        tp=_group("tp", place.dp, list(range(first, first + grid.tp)), rank, grid),
        dp=_group("dp", place.tp, list(range(place.tp, grid.world_size, grid.tp)), rank, grid),
        ep=_make_group("ep", 0, list(range(grid.world_size)), rank) if has_whole_experts(grid) else None,
    )


def has_whole_experts(grid: Grid) -> bool:
    """Whether there are replicas, and no two ranks share an expert: then tokens can be sent to their experts' ranks."""
    return grid.dp > 1 and grid.ep == grid.world_size


def _group(kind: str, number: int, ranks: list[int], rank: int, grid: Grid) -> Group:
    """One of the groups of a kind. All ranks of the job are a group already, and a rank alone needs none."""
    if len(ranks) in (1, grid.world_size):
        return Group(len(ranks), ranks.index(rank))
    return _make_group(kind, number, ranks, rank)


def _make_group(kind: str, number: int, ranks: list[int], rank: int) -> Group:
    name = f"deepspan-{kind}-{number}"
    create_group(name, ranks)
    return Group(len(ranks), ranks.index(rank), name)
