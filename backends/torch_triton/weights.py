"""From the seam's numpy arrays to tensors: this rank's part of each parameter, checked and read once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.params import parameters
from ...models.sharding import Shard, shards
from ...models.spec import ModelSpec
from ..base import Weights
from .parallel import ALONE, Mesh

_READ_AS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def weight_bytes(held: Iterable[Shard], dtype: torch.dtype) -> int:
    """What a loaded model holds: routers and heads are in FP32, kv_b_proj is there for both forms of attention."""
    total = 0
    for shard in held:
        param = shard.param
        exact = param.group in ("router", "head") or param.name.endswith("shared_head.head.weight")
        copies = 2 if param.name.endswith("kv_b_proj.weight") else 1
        total += copies * shard.size * (4 if exact else dtype.itemsize)
    return total


class TensorSource:
    """The parameters of ``spec`` out of ``weights``, as tensors: what this rank of ``mesh`` holds of them.

    Raises InputError at once for a name that is missing or left over, and at ``read`` for a wrong shape.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, mesh: Mesh = ALONE):
        self.dtype = dtype
        self.mesh = mesh
        self.has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        self._weights = weights
        self._shards = {shard.param.name: shard for shard in shards(spec, mesh.grid, mesh.rank, mtp=weights.has_mtp)}
        wanted = [param.name for param in parameters(spec, mtp=weights.has_mtp)]
        found = set(weights.names())
        if missing := [name for name in wanted if name not in found]:
            raise InputError(f"missing: {_some(missing)}", "weights", "get the complete checkpoint of this model")
        if extra := sorted(found - set(wanted)):
            raise InputError(f"no parameter for: {_some(extra)}", "weights", "use the spec of these weights")

    @property
    def held(self) -> Iterable[Shard]:
        """Every part of a parameter that this rank holds."""
        return self._shards.values()

    def shard(self, name: str) -> Shard:
        """The part of a parameter that this rank holds."""
        return self._shards[name]

    def first_row(self, name: str) -> int:
        """Where this rank's rows of a parameter begin."""
        rows = self._shards[name].rows
        return rows[0] if rows else 0

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's part of a parameter in ``dtype``, by default the run's."""
        dtype, shard = dtype or self.dtype, self._shards[name]
        values = self._weights.read(name, _READ_AS[dtype], shard.rows, shard.cols)
        array = np.require(values, requirements=["C", "W"])
        if array.shape != shard.shape:
            found, wanted = list(array.shape), list(shard.shape)
            raise InputError(f"shape {found}", name, f"the model needs {wanted}")
        return torch.from_numpy(array).view(dtype)

    def stack(self, *names: str) -> Tensor:
        """Matrices with the same input one below the other, so that one product computes them all."""
        return torch.cat([self.read(name) for name in names])


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
