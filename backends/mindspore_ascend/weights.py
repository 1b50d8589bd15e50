"""From canonical tensors to the network's parameters: one rank's slices, in MindSpore's inference layout.

Parameters carry the names of that layout with both of its fusions (``qkv_concat``, ``ffn_concat``): projections of one
input lie below each other, each rank's own slices of them, so that one product computes both. Rotary rows are stored
even-then-odd, because the device's operator rotates halves; routed experts are stacks of [in, out].

Letters: E experts, D in, F out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.np_dtype import bfloat16
from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.params import parameters
from ...models.sharding import Grid, Shard, shards
from ...models.spec import ModelSpec
from ..base import Weights

_READ_AS = {ms.float32: "f32", ms.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class Piece:
    """A canonical matrix, or the ``rows`` of this rank's slice of it, in that order."""

    name: str
    rows: NDArray[np.int64] | None = None


class RankWeights:
    """This rank's part of the parameters of ``spec``, held in ``dtype`` (mindspore.float32 or bfloat16).

    Raises InputError at once for a name that is missing or left over, and when a parameter is made for a wrong shape.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, grid: Grid, rank: int, dtype: ms.Type):
        self.spec = spec
        self.dtype = dtype
        self.ranks = grid.tp
        self.has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        self._weights = weights
        _check_names([param.name for param in parameters(spec, mtp=weights.has_mtp)], list(weights.names()))
        self._shards = {shard.param.name: shard for shard in shards(spec, grid, rank, mtp=weights.has_mtp)}
        self.first_token = self._start_row("model.embed_tokens.weight")

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of this rank's slice of a canonical parameter."""
        return self._shards[name].shape

    def vector(self, name: str, canonical: str, dtype: ms.Type | None = None) -> Parameter:
        """One canonical vector."""
        return self._parameter(name, self.shape(canonical), dtype, lambda kind: self._read(canonical, kind))

    def matrix(self, name: str, *pieces: Piece, dtype: ms.Type | None = None) -> Parameter:
        """Canonical matrices of one width, one below the other."""
        heights = [self.shape(piece.name)[0] if piece.rows is None else len(piece.rows) for piece in pieces]
        shape = (sum(heights), self.shape(pieces[0].name)[1])

        def fill(kind: str) -> NDArray:
            parts = [self._read(piece.name, kind) for piece in pieces]
            parts = [
                part if piece.rows is None else part[piece.rows] for part, piece in zip(parts, pieces, strict=True)
            ]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return self._parameter(name, shape, dtype, fill)

    def experts(self, name: str, prefix: str, projections: Sequence[str]) -> Parameter:
        """[E, D, F]: every expert's projections, swapped to [in, out] and beside each other."""
        out, inside = self.shape(f"{prefix}.0.{projections[0]}.weight")
        shape = (self.spec.n_routed_experts, inside, out * len(projections))

        def fill(kind: str) -> NDArray:
            stack = np.empty(shape, np.float32 if kind == "f32" else np.uint16)
            for expert in range(shape[0]):
                for slot, projection in enumerate(projections):
                    weight_FD = self._read(f"{prefix}.{expert}.{projection}.weight", kind)
                    stack[expert, :, slot * out : (slot + 1) * out] = weight_FD.T
            return stack

        return self._parameter(name, shape, None, fill)

    def zeros(self, name: str, shape: tuple[int, ...]) -> Parameter:
        """A buffer of the network, such as a cache."""
        return self._parameter(name, shape, None, lambda kind: np.zeros(shape, np.float32 if kind == "f32" else "u2"))

    def _parameter(
        self, name: str, shape: tuple[int, ...], dtype: ms.Type | None, fill: Callable[[str], NDArray]
    ) -> Parameter:
        dtype = dtype or self.dtype
        array = np.ascontiguousarray(fill(_READ_AS[dtype]))
        assert array.shape == shape, f"{name} is {array.shape}, not {shape}"
        return Parameter(_tensor(array), name=name, requires_grad=False)

    def _read(self, canonical: str, kind: str) -> NDArray:
        shard = self._shards[canonical]
        array = self._weights.read(canonical, kind, shard.rows, shard.cols)
        if array.shape != shard.shape:
            found, wanted = list(array.shape), list(shard.shape)
            raise InputError(f"shape {found}", canonical, f"the model needs {wanted}")
        return array

    def _start_row(self, canonical: str) -> int:
        rows = self._shards[canonical].rows
        return rows[0] if rows else 0


def rank_bytes(held: Sequence[Shard], dtype: ms.Type) -> int:
    """What the parameters of these shards take: routers and heads are in FP32, everything else in ``dtype``."""
    width = 4 if dtype == ms.float32 else 2
    return sum(shard.size * (4 if _exact(shard) else width) for shard in held)


def _exact(shard: Shard) -> bool:
    return shard.param.group in ("router", "head") or shard.param.name.endswith("shared_head.head.weight")


def _tensor(array: NDArray) -> Tensor:
    """BF16 comes as bit patterns and is handed over as such."""
    return Tensor(array.view(bfloat16) if array.dtype == np.uint16 else array)


def _check_names(wanted: list[str], found: list[str]) -> None:
    known = set(found)
    if missing := [name for name in wanted if name not in known]:
        raise InputError(f"missing: {_some(missing)}", "weights", "get the complete checkpoint of this model")
    if extra := sorted(known - set(wanted)):
        raise InputError(f"no parameter for: {_some(extra)}", "weights", "use the spec of these weights")


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
