"""Reading and making tensors through layout maps (`models.layouts`), a window at a time.

A target is seen as a matrix: the first axis of a stack of matrices is unfolded into its rows. Letters: a placement puts
rows of a source into a region of the target, both ways through `Placement`'s fields; the target may hold it transposed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import to_f32
from ..models.errors import InputError
from ..models.layouts.placement import Placement, TargetTensor
from ..models.params import Param
from ..models.quant import result_dtype, round_to
from .formats import Range
from .pages import empty_pages
from .plan import Output
from .safetensors import Reader, TensorInfo
from .transposing import contiguous, put

_READ_AS = {"BF16": "bf16", "F32": "f32", "F16": "f32"}


class CanonicalReader(Protocol):
    """What `CheckpointWeights` offers: parameters by their canonical names."""

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray: ...


class TransposingReader(CanonicalReader, Protocol):
    """What `FastWeights` offers beside: ``read(...).T``, contiguous."""

    def read_transposed(
        self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None
    ) -> NDArray: ...


# Canonical to layout ------------------------------------------------------------------------------------------------


def target_output(
    target: TargetTensor, weights: TransposingReader, shapes: Mapping[str, tuple[int, ...]], sources: Iterable[str]
) -> Output:
    """How to make a target from canonical weights; ``sources`` are the stored tensors that it consumes."""
    matrix = target.shape[-2:]
    placed = defaultdict(list)
    for placement in target.placements:
        placed[placement.index or 0].append(placement)
    is_transposed = any(placement.transpose for placement in target.placements)
    unit = matrix[0] if is_transposed else 1
    width = matrix[1] if len(matrix) > 1 else 1
    read_bytes = 1 + result_dtype(_READ_AS[target.dtype]).itemsize  # a stored code and its value
    return Output(
        name=target.name,
        dtype=target.dtype,
        shape=target.shape,
        sources=tuple(sources),
        make=partial(_make_rows, target, placed, weights, shapes),
        rows=prod(target.shape[:-1]) if len(target.shape) > 1 else target.shape[0],
        unit=unit,
        # a matrix is held as it is stored and turned; rows that are gathered lie among up to three times as many
        work_bytes=read_bytes * (2 if is_transposed else 3) * unit * width,
    )


def _make_rows(
    target: TargetTensor,
    placed: Mapping[int, Sequence[Placement]],
    weights: TransposingReader,
    shapes: Mapping[str, tuple[int, ...]],
    start: int,
    stop: int,
) -> NDArray:
    """Rows of the unfolded target."""
    dtype = _READ_AS[target.dtype]
    shape = stop - start, target.shape[-1] if len(target.shape) > 1 else 1
    out: NDArray | None = None
    for row, column, piece in _pieces(target, placed, weights, shapes, (start, stop)):
        if piece.shape == shape:  # nothing lies beside it
            out = contiguous(piece)
            break
        if out is None:
            out = empty_pages(shape, result_dtype(dtype))
        put(out[row : row + piece.shape[0], column : column + piece.shape[1]], piece)
    assert out is not None, f"{target.name}: nothing fills rows {start} to {stop}"
    return _as_f16(out, target.name) if target.dtype == "F16" else out


def _pieces(
    target: TargetTensor,
    placed: Mapping[int, Sequence[Placement]],
    weights: TransposingReader,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Range,
) -> Iterator[tuple[int, int, NDArray]]:
    """What fills rows of the unfolded target, always with two axes: (first row among these, first column, piece)."""
    height = target.shape[-2] if len(target.shape) > 1 else target.shape[0]
    for index in range(rows[0] // height, -(-rows[1] // height)):
        for placement in placed[index]:
            top = index * height + placement.offset[0]
            begin = max(rows[0], top)
            end = min(rows[1], (index + 1) * height, top + placement.piece_shape(shapes[placement.source])[0])
            if begin < end:
                piece = _piece(placement, weights, _READ_AS[target.dtype], (begin - top, end - top))
                yield begin - rows[0], placement.offset[1], piece


def _piece(placement: Placement, weights: TransposingReader, dtype: str, rows: Range) -> NDArray:
    """Rows of a placement's piece as it lies in the target."""
    if not placement.transpose:
        return _chosen_rows(placement, weights, dtype, rows)
    assert placement.rows is None, f"{placement.source}: rows are chosen and transposed"
    first = placement.columns[0] if placement.columns else 0
    return weights.read_transposed(placement.source, dtype, None, (first + rows[0], first + rows[1]))


def _chosen_rows(placement: Placement, weights: CanonicalReader, dtype: str, rows: Range) -> NDArray:
    """A run of the source's rows in the placement's order."""
    if placement.rows is None:
        source = weights.read(placement.source, dtype, rows, placement.columns)
    else:
        chosen = placement.rows[slice(*rows)]
        span = int(chosen.min()), int(chosen.max()) + 1
        source = weights.read(placement.source, dtype, span, placement.columns)[chosen - span[0]]
    return source if source.ndim == 2 else source[:, None]


def _as_f16(values: NDArray, name: str) -> NDArray:
    """F16 of FP32 values, rounded once. BF16 reaches further than F16: what does not fit is an error."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if np.isinf(narrow).sum() > np.isinf(values).sum():
        raise InputError(f"{name} has values above 65504", "--dtype fp16", "use bf16 or fp32")
    return narrow


# Layout to canonical ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A placement and the stored tensor that it is in, unfolded into a matrix."""

    matrix: TensorInfo
    placement: Placement
    top: int  # the piece's first row in the matrix


class LayoutWeights:
    """Canonical parameters, read out of a checkpoint of another layout.

    ``targets`` is the layout; every target must be among ``tensors``, in its shape and as BF16, F16 or F32. ``shared``
    maps parameters that the layout leaves out to those whose copies they are.
    """

    def __init__(
        self,
        reader: Reader,
        tensors: Mapping[str, TensorInfo],
        targets: Iterable[TargetTensor],
        params: Mapping[str, Param],
        shared: Mapping[str, str],
    ):
        self._reader = reader
        self._params = params
        self.shared = shared
        self._found: dict[str, list[_Found]] = defaultdict(list)
        self._sources: dict[str, list[str]] = defaultdict(list)
        for target in targets:
            matrix = _unfolded(tensors[target.name])
            height = target.shape[-2] if len(target.shape) == 3 else 0
            for placement in target.placements:
                top = (placement.index or 0) * height + placement.offset[0]
                self._found[placement.source].append(_Found(matrix, placement, top))
                self._sources[placement.source].append(target.name)

    def names(self) -> list[str]:
        """The canonical names that can be read, in checkpoint order."""
        return list(self._params)

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a parameter is read from."""
        return tuple(self._sources[self.shared.get(name, name)])

    def unit(self, name: str) -> int:
        """The number of a parameter's rows below which reading is wasteful: all of them when it lies transposed."""
        found = self._found[self.shared.get(name, name)]
        return self._params[name].shape[0] if any(place.placement.transpose for place in found) else 1

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """As `CheckpointWeights.read`; the result may be a transposed view."""
        shape = self._params[name].shape
        rows, cols = rows or (0, shape[0]), cols or (0, prod(shape[1:]))
        places = self._found[self.shared.get(name, name)]
        if len(places) == 1 and places[0].placement.rows is None and places[0].placement.columns is None:
            out = self._piece(places[0], dtype, rows, cols)
        else:
            out = np.empty((rows[1] - rows[0], cols[1] - cols[0]), result_dtype(dtype))
            for place in places:
                self._gather(place, dtype, rows, cols, out)
        return out if len(shape) == 2 else out[:, 0]

    def read_transposed(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """``read(...).T``, contiguous."""
        return contiguous(self.read(name, dtype, rows, cols).T)

    def _gather(self, place: _Found, dtype: str, rows: Range, cols: Range, out: NDArray) -> None:
        """Put what a placement holds of a window into ``out``."""
        placement = place.placement
        height = self._params[placement.source].shape[0]
        held = np.arange(height) if placement.rows is None else placement.rows
        positions = np.flatnonzero((held >= rows[0]) & (held < rows[1]))
        first, last = placement.columns or (0, cols[1])
        begin, end = max(first, cols[0]), min(last, cols[1])
        if not len(positions) or begin >= end:
            return
        span = int(positions.min()), int(positions.max()) + 1
        piece = self._piece(place, dtype, span, (begin - first, end - first))
        out[held[positions] - rows[0], begin - cols[0] : end - cols[0]] = piece[positions - span[0]]

    def _piece(self, place: _Found, dtype: str, rows: Range, cols: Range) -> NDArray:
        """A window of a placement's piece, turned as the source is."""
        left = place.placement.offset[1]
        down, across = (cols, rows) if place.placement.transpose else (rows, cols)
        in_rows = place.top + down[0], place.top + down[1]
        in_cols = left + across[0], left + across[1]
        stored = self._reader.read_window(place.matrix, in_rows, in_cols)
        values = _converted(stored, place.matrix.dtype, dtype)
        return values.T if place.placement.transpose else values


def _unfolded(info: TensorInfo) -> TensorInfo:
    shape = (*info.shape, 1) if len(info.shape) == 1 else info.shape
    return replace(info, shape=(prod(shape[:-1]), shape[-1]))


def _converted(array: NDArray, stored: str, dtype: str) -> NDArray:
    return array if (stored, dtype) == ("BF16", "bf16") else round_to(to_f32(array, stored), dtype)
