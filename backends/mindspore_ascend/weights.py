"""From canonical tensors to the network's parameters: one rank's slices, in MindSpore's inference layout.

Parameters carry the names of that layout with both of its fusions (``qkv_concat``, ``ffn_concat``): projections of one
input lie below each other, each rank's own slices of them, so that one product computes both. Rotary rows are stored
even-then-odd, because the device's operator rotates halves; routed experts are stacks of [in, out].

Letters: E experts, D in, F out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.np_dtype import bfloat16
from numpy.typing import NDArray

from ...models.dtypes import f32_to_bf16
from ...models.errors import InputError
from ...models.params import parameters
from ...models.quantise import quantise_int8_channels
from ...models.sharding import Shard, shards
from ...models.spec import ModelSpec
from ..base import Weights
from .mesh import Mesh

_READ_AS = {ms.float32: "f32", ms.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class Piece:
    """A canonical matrix, or the ``rows`` of this rank's slice of it, in that order."""

    name: str
    rows: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class InputMapping:
    """A linear layer's inputs as INT8: clip(round(x / scale + offset), -128, 127)."""

    scale: float
    offset: int


class RankWeights:
    """This rank's part of the parameters of ``spec``, held in ``dtype`` (mindspore.float32 or bfloat16).

    With ``int8`` the linear layers ask for codes and scales instead. Raises InputError at once for a name that is
    missing or left over, and when a parameter is made for a wrong shape.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, mesh: Mesh, dtype: ms.Type, int8: bool = False):
        self.spec = spec
        self.dtype = dtype
        self.int8 = int8
        self.mesh = mesh
        self.experts_held = _experts_held(spec, mesh)
        self.has_mtp = weights.has_mtp and spec.num_nextn_predict_layers > 0
        self._weights = weights
        _check_names([param.name for param in parameters(spec, mtp=weights.has_mtp)], list(weights.names()))
        self._shards = {shard.param.name: shard for shard in shards(spec, mesh.grid, mesh.rank, mtp=weights.has_mtp)}
        self.first_token = self._start_row("model.embed_tokens.weight")

    def vector(self, name: str, canonical: str, dtype: ms.Type | None = None) -> Parameter:
        """One canonical vector."""
        dtype = dtype or self.dtype
        return self._parameter(name, self._shape(canonical), dtype, lambda: self._read(canonical, _READ_AS[dtype]))

    def matrix(self, name: str, *pieces: Piece, dtype: ms.Type | None = None) -> Parameter:
        """Canonical matrices of one width, one below the other."""
        dtype = dtype or self.dtype

        def fill() -> NDArray:
            return _below(pieces, [self._read(piece.name, _READ_AS[dtype]) for piece in pieces])

        return self._parameter(name, self._stacked_shape(pieces), dtype, fill)

    def codes(self, name: str, *pieces: Piece) -> tuple[Parameter, Parameter]:
        """The same as INT8 codes, and their FP32 scales [rows]."""
        shape = self._stacked_shape(pieces)

        @cache
        def fill() -> tuple[NDArray, NDArray]:
            codes, scales = zip(*(self._read_codes(piece.name) for piece in pieces), strict=True)
            return _below(pieces, codes), _below(pieces, scales)

        return (
            self._parameter(f"{name}._layer.weight", shape, ms.int8, lambda: fill()[0]),
            self._parameter(f"{name}._layer.matmul.weight_scale", shape[:1], ms.float32, lambda: fill()[1]),
        )

    def input_mapping(self, piece: Piece) -> InputMapping | None:
        """How the checkpoint fixes the INT8 inputs of a piece; None when they are quantised as they come."""
        found = self._weights.static_input(piece.name)
        return InputMapping(*found[:2]) if found else None

    def static_codes(self, name: str, *pieces: Piece) -> tuple[Parameter, Parameter, Parameter]:
        """`codes` for inputs that are mapped: codes, FP32 scales of the sums of products, INT32 biases of the sums."""
        shape = self._stacked_shape(pieces)

        @cache
        def fill() -> tuple[NDArray, NDArray, NDArray]:
            codes, scales, biases = zip(*(self._read_static(piece.name) for piece in pieces), strict=True)
            return _below(pieces, codes), _below(pieces, scales), _below(pieces, biases)

        return (
            self._parameter(f"{name}._layer.weight", shape, ms.int8, lambda: fill()[0]),
            self._parameter(f"{name}._layer.matmul.dequant_scale", shape[:1], ms.float32, lambda: fill()[1]),
            self._parameter(f"{name}._layer.matmul.quant_bias", shape[:1], ms.int32, lambda: fill()[2]),
        )

    def experts(self, name: str, prefix: str, projections: Sequence[str]) -> Parameter:
        """[E, D, F]: each held expert's projections, swapped to [in, out] and beside each other."""

        def fill() -> NDArray:
            return self._swapped(shape, prefix, projections, lambda name: self._read(name, _READ_AS[self.dtype]))

        shape = self._expert_shape(prefix, projections)
        return self._parameter(name, shape, self.dtype, fill)

    def expert_codes(self, name: str, prefix: str, projections: Sequence[str]) -> tuple[Parameter, Parameter]:
        """The same as INT8 codes, and their scales [E, F] in the run's dtype."""
        if self._weights.static_input(f"{prefix}.{self.experts_held.start}.{projections[0]}.weight"):
            what = "static activation scales of routed experts are not supported"
            raise InputError(what, prefix, "set dtype to bf16, or use experts that quantise their inputs as they come")
        shape = self._expert_shape(prefix, projections)
        scales_EF = np.empty((shape[0], shape[2]), np.float32)

        def read(canonical: str) -> NDArray:
            codes_FD, scales_F = self._read_codes(canonical)
            expert, projection = canonical.removeprefix(f"{prefix}.").split(".")[:2]
            start = projections.index(projection) * len(scales_F)
            scales_EF[self.experts_held.index(int(expert)), start : start + len(scales_F)] = scales_F
            return codes_FD

        def fill_scales() -> NDArray:
            return f32_to_bf16(scales_EF) if self.dtype == ms.bfloat16 else scales_EF

        return (
            self._parameter(
                f"{name}._layer.weight", shape, ms.int8, lambda: self._swapped(shape, prefix, projections, read)
            ),
            self._parameter(f"{name}._layer.matmul.weight_scale", scales_EF.shape, self.dtype, fill_scales),
        )

    def zeros(self, name: str, shape: tuple[int, ...]) -> Parameter:
        """A buffer of the network, such as a cache."""
        kind = np.float32 if self.dtype == ms.float32 else np.uint16
        return self._parameter(name, shape, self.dtype, lambda: np.zeros(shape, kind))

    def _parameter(self, name: str, shape: tuple[int, ...], dtype: ms.Type, fill: Callable[[], NDArray]) -> Parameter:
        array = np.ascontiguousarray(fill())
        assert array.shape == shape, f"{name} is {array.shape}, not {shape}"
        return Parameter(_tensor(array), name=name, requires_grad=False)

    def _shape(self, canonical: str) -> tuple[int, ...]:
        return self._shards[canonical].shape

    def _stacked_shape(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        heights = [self._shape(piece.name)[0] if piece.rows is None else len(piece.rows) for piece in pieces]
        return sum(heights), self._shape(pieces[0].name)[1]

    def _expert_shape(self, prefix: str, projections: Sequence[str]) -> tuple[int, int, int]:
        out, inside = self._shape(f"{prefix}.{self.experts_held.start}.{projections[0]}.weight")
        return len(self.experts_held), inside, out * len(projections)

    def _swapped(
        self, shape: tuple[int, int, int], prefix: str, projections: Sequence[str], read: Callable[[str], NDArray]
    ) -> NDArray:
        """The stack of the held experts' matrices, [in, out]."""
        out = shape[2] // len(projections)
        stack: NDArray | None = None
        for place, expert in enumerate(self.experts_held):
            for slot, projection in enumerate(projections):
                weight_FD = read(f"{prefix}.{expert}.{projection}.weight")
                stack = np.empty(shape, weight_FD.dtype) if stack is None else stack
                stack[place, :, slot * out : (slot + 1) * out] = weight_FD.T
        assert stack is not None, "a mixture of experts has experts"
        return stack

    def _read(self, canonical: str, kind: str) -> NDArray:
        shard = self._shards[canonical]
        array = self._weights.read(canonical, kind, shard.rows, shard.cols)
        if array.shape != shard.shape:
            found, wanted = list(array.shape), list(shard.shape)
            raise InputError(f"shape {found}", canonical, f"the model needs {wanted}")
        return array

    def _read_codes(self, canonical: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """INT8 codes [N, K] and scales [N] of this rank's slice: the checkpoint's own, or made here."""
        shard = self._shards[canonical]
        if stored := self._weights.int8_channels(canonical, shard.rows, shard.cols):
            return stored
        codes_NK, scales_N1 = quantise_int8_channels(self._read(canonical, "f32"))
        return codes_NK, scales_N1[:, 0]

    def _read_static(self, canonical: str) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
        """Codes [N, K], scales [N] and biases [N] of this rank's slice.

        A stored bias is that of all columns: of the ranks that share them, the first one adds it.
        """
        shard = self._shards[canonical]
        found = self._weights.static_input(canonical, shard.rows)
        assert found is not None, "the inputs are mapped"
        scale, offset, bias_N = found
        codes_NK, scales_N = self._read_codes(canonical)
        if bias_N is None:
            bias_N = (-offset * codes_NK.sum(1, dtype=np.int64)).astype(np.int32)
        elif shard.cols is not None and shard.cols[0] > 0:
            bias_N = np.zeros_like(bias_N)
        return codes_NK, scales_N * np.float32(scale), bias_N

    def _start_row(self, canonical: str) -> int:
        rows = self._shards[canonical].rows
        return rows[0] if rows else 0


def _experts_held(spec: ModelSpec, mesh: Mesh) -> range:
    """The routed experts of which this rank holds all or, with other ranks of its group, a slice of the width."""
    each = spec.n_routed_experts // mesh.grid.ep
    first = mesh.grid.position(mesh.rank).expert_group * each
    return range(first, first + each)


def rank_bytes(held: Sequence[Shard], dtype: ms.Type, int8: bool) -> int:
    """What the parameters of these shards take: routers and heads are in FP32, linear layers may be codes."""
    width = 4 if dtype == ms.float32 else 2
    return sum(shard.size * (4 if _exact(shard) else 1 if int8 and _linear(shard) else width) for shard in held)


def _exact(shard: Shard) -> bool:
    return shard.param.group in ("router", "head") or shard.param.name.endswith("shared_head.head.weight")


def _linear(shard: Shard) -> bool:
    """What a W8A8 network holds as codes; kv_b_proj is not multiplied by activations alone and stays plain."""
    groups = ("attention", "dense", "expert", "shared")
    return shard.param.group in groups and not shard.param.name.endswith("kv_b_proj.weight")


def _below(pieces: Sequence[Piece], parts: Sequence[NDArray]) -> NDArray:
    """The pieces' rows of their arrays, one below the other."""
    chosen = [part if piece.rows is None else part[piece.rows] for piece, part in zip(pieces, parts, strict=True)]
    return chosen[0] if len(chosen) == 1 else np.concatenate(chosen)


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
