"""Canonical parameters read out of a source of any layout, and placed in another, in the most obvious way.

Only for a few rows at a time; see `slow_formats` for why it is written a second time. Values are FP32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Protocol

import numpy as np

from ...models.dtypes import Float32, bf16_to_f32, f32_to_bf16, to_f32
from ...models.layouts.placement import Placement, TargetTensor, sources_of
from ...models.layouts.recognise import mindspore_targets
from ...models.params import Param
from ..formats import Range
from ..golden_stick import GoldenStickReader
from ..kinds.mindspore import MindSporeSource
from ..kinds.source import HuggingFaceSource
from ..safetensors import TensorInfo
from ..storage import PLAIN
from . import slow_formats


class Canonical(Protocol):
    """FP32 values of windows of parameters: [n, k], a vector as a matrix of one column."""

    params: Mapping[str, Param]

    def window(self, name: str, rows: Range, cols: Range) -> Float32: ...


class FromHuggingFace:
    """Quantised weights are rounded to BF16 where ``through_bf16``, as if they had been converted to that first."""

    def __init__(self, source: HuggingFaceSource, through_bf16: bool = True):
        self.params = source.params
        self._source = source
        self._through_bf16 = through_bf16

    def window(self, name: str, rows: Range, cols: Range) -> Float32:
        stored = self._source.weights.stored(name)
        values = slow_formats.window(self._source.checkpoint, stored, rows, cols)
        is_plain = stored.format in PLAIN.values()
        return bf16_to_f32(f32_to_bf16(values)) if self._through_bf16 and not is_plain else values


class FromMindSpore:
    def __init__(self, source: MindSporeSource, reader: GoldenStickReader):
        self.params = source.params
        self._shared = source.weights.shared
        self._reader = reader
        self._tensors = reader.plain(
            {name: info for header in source.checkpoint.headers.values() for name, info in header.tensors.items()}
        )
        self._places: dict[str, list[tuple[TargetTensor, Placement]]] = {}
        targets = mindspore_targets(source.layout, source.model.spec, source.has_mtp, self._tensors)
        for name, target, placement in sources_of(targets):
            self._places.setdefault(name, []).append((target, placement))

    def window(self, name: str, rows: Range, cols: Range) -> Float32:
        name = self._shared.get(name, name)
        out = np.full((rows[1] - rows[0], cols[1] - cols[0]), np.nan, np.float32)
        for target, placement in self._places[name]:
            assert placement.columns is None, "no layout cuts columns"
            held = np.arange(self.params[name].shape[0]) if placement.rows is None else placement.rows
            wanted = np.flatnonzero((held >= rows[0]) & (held < rows[1]))
            for position in wanted:
                out[held[position] - rows[0]] = self._row(target, placement, int(position), cols)
        return out

    def _row(self, target: TargetTensor, placement: Placement, position: int, cols: Range) -> Float32:
        """A row of a piece, which is a column of the target where the piece lies transposed."""
        info = self._tensors[target.name]
        top = (placement.index or 0) * (target.shape[-2] if len(target.shape) > 1 else 0) + placement.offset[0]
        left = placement.offset[1]
        if placement.transpose:
            window = (top + cols[0], top + cols[1]), (left + position, left + position + 1)
        else:
            window = (top + position, top + position + 1), (left + cols[0], left + cols[1])
        return to_f32(self._reader.read_window(unfolded(info), *window), info.dtype).reshape(-1)


def unfolded(info: TensorInfo) -> TensorInfo:
    """A tensor as a matrix: a vector as one column, a stack of matrices one under the other."""
    shape = (*info.shape, 1) if len(info.shape) == 1 else info.shape
    return replace(info, shape=(prod(shape[:-1]), shape[-1]))


def target_rows(target: TargetTensor, canonical: Canonical, rows: Range) -> Float32:
    """Rows of the unfolded target; all of one matrix."""
    shape = target.shape if len(target.shape) > 1 else (*target.shape, 1)
    index, first = divmod(rows[0], shape[-2])
    last = first + rows[1] - rows[0]
    assert last <= shape[-2], f"rows {rows} of {target.name} are of two matrices"
    out = np.full((last - first, shape[-1]), np.nan, np.float32)
    for placement in target.placements:
        if (placement.index or 0) != index:
            continue
        top, left = placement.offset
        piece_shape = placement.piece_shape(canonical.params[placement.source].shape)
        begin, end = max(first, top), min(last, top + piece_shape[0])
        if begin < end:
            piece = _piece(placement, canonical, (begin - top, end - top))
            out[begin - first : end - first, left : left + piece.shape[1]] = piece
    return out


def _piece(placement: Placement, canonical: Canonical, rows: Range) -> Float32:
    """Rows of a piece as it lies in the target."""
    shape = canonical.params[placement.source].shape
    height, width = shape[0], prod(shape[1:])
    if placement.transpose:
        assert placement.rows is None, "no layout turns chosen rows"
        return canonical.window(placement.source, (0, height), rows).T
    if placement.rows is None:
        return canonical.window(placement.source, rows, (0, width))
    chosen = placement.rows[slice(*rows)]
    return np.concatenate([canonical.window(placement.source, (int(n), int(n) + 1), (0, width)) for n in chosen])
