"""Which part of which parameter lies on which rank: tensor, expert, data and pipeline parallelism in one rule.

Ranks are numbered with the tensor index fastest, then data, then pipeline: rank = (pp · DP + dp) · TP + tp.

- Layers go to pipeline stages in order, as evenly as they divide; the first stage has the embedding, the last the final
  norm, the head and the MTP layers (and the embedding again, which MTP reads).
- Attention, dense and shared FFN, embedding and head are split over the TP ranks and repeated on every DP rank.
- Routed experts are split over all TP · DP ranks of a stage: EP ways by whole experts, the rest by width.
- Norms, router and the down-projections q_a and kv_a are on every rank of the stage.

Everything is contiguous, so a slice is a (start, stop) of rows and one of columns: what `Weights.read` takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import InputError
from .params import Param, parameters
from .spec import ModelSpec

Range = tuple[int, int]
_SPLIT_BY_TP = ("heads", "ffn", "vocab")


@dataclass(frozen=True)
class Position:
    """One rank's place: pipeline stage, data and tensor index, and which experts it holds how much of."""

    pp: int
    dp: int
    tp: int
    expert_group: int  # 0 … EP - 1
    expert_slice: int  # 0 … TP · DP / EP - 1


@dataclass(frozen=True)
class Grid:
    """Degrees of parallelism, as in the run YAML's ``parallel`` section."""

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.stage_ranks % self.ep:
            raise InputError(
                f"ep {self.ep} does not divide tp {self.tp} x dp {self.dp}",
                "parallel",
                f"give a divisor of {self.stage_ranks}",
            )

    @property
    def stage_ranks(self) -> int:
        return self.tp * self.dp

    @property
    def world_size(self) -> int:
        return self.stage_ranks * self.pp

    @property
    def expert_slices(self) -> int:
        """Ranks that share one expert's width."""
        return self.stage_ranks // self.ep

    def position(self, rank: int) -> Position:
        """The place of ``rank``, 0 … world_size - 1."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        stage, inside = divmod(rank, self.stage_ranks)
        dp, tp = divmod(inside, self.tp)
        group, slice_ = divmod(inside, self.expert_slices)
        return Position(stage, dp, tp, group, slice_)


@dataclass(frozen=True)
class Shard:
    """The part of ``param`` that a rank holds; None is the whole axis."""

    param: Param
    rows: Range | None = None
    cols: Range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        windows = (self.rows, self.cols)[: len(self.param.shape)]
        return tuple(
            size if window is None else window[1] - window[0]
            for size, window in zip(self.param.shape, windows, strict=True)
        )

    @property
    def size(self) -> int:
        rows, *cols = self.shape
        return rows * cols[0] if cols else rows


def stage_layers(spec: ModelSpec, grid: Grid, stage: int) -> range:
    """The main layers of a pipeline stage; earlier stages take the remainder, later ones carry head and MTP."""
    each, rest = divmod(spec.num_hidden_layers, grid.pp)
    start = stage * each + min(stage, rest)
    return range(start, start + each + (stage < rest))


def check_divides(spec: ModelSpec, grid: Grid) -> None:
    """Refuse degrees that do not divide the model, naming the size and the degrees that would."""
    splits = [
        ("num_attention_heads", spec.num_attention_heads, "parallel.tp", grid.tp),
        ("vocab_size", spec.vocab_size, "parallel.tp", grid.tp),
    ]
    if spec.first_k_dense_replace or spec.moe_layer_freq > 1 or not spec.n_routed_experts:
        splits.append(("intermediate_size", spec.intermediate_size, "parallel.tp", grid.tp))
    if spec.n_routed_experts:
        width = spec.moe_intermediate_size
        splits.append(("n_routed_experts", spec.n_routed_experts, "parallel.ep", grid.ep))
        splits.append(("moe_intermediate_size", width, "parallel.tp x dp / ep", grid.expert_slices))
    if spec.n_shared_experts:
        splits.append(("shared experts' width", spec.shared_intermediate_size, "parallel.tp", grid.tp))
    for name, size, key, degree in splits:
        if size % degree:
            raise InputError(f"{key} = {degree} does not divide {name} = {size}", key, f"give {_divisors(size)}")
    if grid.pp > spec.num_hidden_layers:
        raise InputError(
            f"{grid.pp} stages for {spec.num_hidden_layers} layers", "parallel.pp", "give every stage a layer"
        )


def _divisors(size: int) -> str:
    found = [str(degree) for degree in range(1, 129) if size % degree == 0]
    return f"one of {', '.join(found)}"


def shards(spec: ModelSpec, grid: Grid, rank: int, mtp: bool = True) -> Iterator[Shard]:
    """What ``rank`` holds, in checkpoint order. `check_divides` must have passed."""
    position = grid.position(rank)
    layers, last = stage_layers(spec, grid, position.pp), position.pp == grid.pp - 1
    for param in parameters(spec, mtp):
        if _on_stage(param, layers, position.pp == 0, last, has_mtp=mtp and bool(spec.mtp_layers())):
            shard = _shard(param, grid, position, spec.n_routed_experts)
            if shard is not None:
                yield shard


def _on_stage(param: Param, layers: range, first: bool, last: bool, has_mtp: bool) -> bool:
    if param.group == "embedding":
        return first or (last and has_mtp)
    if param.layer is None:
        return last
    return param.layer in layers or (last and param.layer >= layers.stop)


def _shard(param: Param, grid: Grid, position: Position, experts: int) -> Shard | None:
    if param.expert is None:
        return _split(param, _SPLIT_BY_TP, grid.tp, position.tp)
    each = experts // grid.ep
    if param.expert // each != position.expert_group:
        return None
    return _split(param, ("ffn",), grid.expert_slices, position.expert_slice)


def _split(param: Param, axes: tuple[str, ...], parts: int, index: int) -> Shard:
    windows: list[Range | None] = [None, None]
    for axis, name in enumerate(param.axes):
        if name in axes and parts > 1:
            each = param.shape[axis] // parts
            windows[axis] = (index * each, (index + 1) * each)
    return Shard(param, *windows)
