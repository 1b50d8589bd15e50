"""From the seam's numpy arrays to tensors: each parameter is checked, read once and held in the run's dtype."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...models.errors import InputError
from ...models.params import parameters
from ...models.spec import ModelSpec
from ..base import Weights

_READ_AS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def weight_bytes(spec: ModelSpec, mtp: bool, dtype: torch.dtype) -> int:
    """What the loaded model holds: routers and heads are in FP32, kv_b_proj is there for both forms of attention."""
    total = 0
    for param in parameters(spec, mtp):
        exact = param.group in ("router", "head") or param.name.endswith("shared_head.head.weight")
        copies = 2 if param.name.endswith("kv_b_proj.weight") else 1
        total += copies * param.size * (4 if exact else dtype.itemsize)
    return total


class TensorSource:
    """The parameters of ``spec`` out of ``weights``, as tensors.

    Raises InputError at once for a name that is missing or left over, and at ``read`` for a wrong shape.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, dtype: torch.dtype):
        self.dtype = dtype
        self.has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        self._weights = weights
        self._shapes = {param.name: param.shape for param in parameters(spec, mtp=weights.has_mtp)}
        found = set(weights.names())
        if missing := [name for name in self._shapes if name not in found]:
            raise InputError(f"missing: {_some(missing)}", "weights", "get the complete checkpoint of this model")
        if extra := sorted(found - self._shapes.keys()):
            raise InputError(f"no parameter for: {_some(extra)}", "weights", "use the spec of these weights")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter in ``dtype``, by default the run's."""
        dtype = dtype or self.dtype
        array = np.require(self._weights.read(name, _READ_AS[dtype]), requirements=["C", "W"])
        if array.shape != self._shapes[name]:
            found, wanted = list(array.shape), list(self._shapes[name])
            raise InputError(f"shape {found}", name, f"the model needs {wanted}")
        return torch.from_numpy(array).view(dtype)

    def stack(self, *names: str) -> Tensor:
        """Matrices with the same input one below the other, so that one product computes them all."""
        return torch.cat([self.read(name) for name in names])


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
