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
from . import fast_weights
from .formats import Range
from .pages import empty_pages
from .plan import Output
from .safetensors import Reader, TensorInfo

_READ_AS = {"BF16": "bf16", "F32": "f32", "F16": "f32"}
_TILE = 128  # a square of 16-bit elements that stays in the second-level cache, twice
_RUN = 1 << 20  # elements that are turned at a time


class CanonicalReader(Protocol):
    """What `CheckpointWeights` offers: parameters by their canonical names."""

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray: ...


# Canonical to layout ------------------------------------------------------------------------------------------------


def target_output(
    target: TargetTensor, weights: CanonicalReader, shapes: Mapping[str, tuple[int, ...]], sources: Iterable[str]
) -> Output:
    """How to make a target from canonical weights; ``sources`` are the stored tensors that it consumes."""
    matrix = target.shape[-2:]
    placed = defaultdict(list)
    for placement in target.placements:
        placed[placement.index or 0].append(placement)
    is_transposed = any(placement.transpose for placement in target.placements)
    read_bytes = 1 + result_dtype(_READ_AS[target.dtype]).itemsize  # a stored code and its value
    return Output(
        name=target.name,
        dtype=target.dtype,
        shape=target.shape,
        sources=tuple(sources),
        make=partial(_make_rows, target, placed, weights, shapes),
        rows=prod(target.shape[:-1]) if len(target.shape) > 1 else target.shape[0],
        unit=matrix[0] if is_transposed else 1,
        # rows that are gathered lie among up to three times as many
        work_bytes=read_bytes * (max(_RUN, _TILE * matrix[0]) if is_transposed else 3 * prod(target.shape[1:])),
    )


def _make_rows(
    target: TargetTensor,
    placed: Mapping[int, Sequence[Placement]],
    weights: CanonicalReader,
    shapes: Mapping[str, tuple[int, ...]],
    start: int,
    stop: int,
) -> NDArray:
    """Rows of the unfolded target."""
    height = target.shape[-2] if len(target.shape) > 1 else target.shape[0]
    width = target.shape[-1] if len(target.shape) > 1 else 1
    dtype = _READ_AS[target.dtype]
    out = empty_pages((stop - start, width), result_dtype(dtype))
    for index in range(start // height, -(-stop // height)):
        first = index * height
        low, high = max(start, first), min(stop, first + height)
        for placement in placed[index]:
            top, left = first + placement.offset[0], placement.offset[1]
            height_of_piece = placement.piece_shape(shapes[placement.source])[0]
            begin, end = max(low, top), min(high, top + height_of_piece)
            if begin < end:
                rows = out[begin - start : end - start]
                for column, piece in _pieces(placement, weights, dtype, (begin - top, end - top), shapes):
                    _copy(rows[:, left + column : left + column + piece.shape[1]], piece)
    return _as_f16(out, target.name) if target.dtype == "F16" else out


def _pieces(
    placement: Placement, weights: CanonicalReader, dtype: str, rows: Range, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[int, NDArray]]:
    """Rows of a piece as it lies in the target, always with two axes, in runs of columns: (first column, run)."""
    if not placement.transpose:
        yield 0, _chosen_rows(placement, weights, dtype, rows, placement.columns)
        return
    # The target's columns are the source's rows: some at a time, so that only these are held beside the target.
    first = placement.columns[0] if placement.columns else 0
    columns = first + rows[0], first + rows[1]
    height = shapes[placement.source][0] if placement.rows is None else len(placement.rows)
    step = _TILE * max(1, _RUN // (_TILE * (rows[1] - rows[0])))
    for start in range(0, height, step):
        run = start, min(start + step, height)
        yield start, _chosen_rows(placement, weights, dtype, run, columns).T


def _chosen_rows(
    placement: Placement, weights: CanonicalReader, dtype: str, rows: Range, columns: Range | None
) -> NDArray:
    """A run of the source's rows in the placement's order."""
    if placement.rows is None:
        source = weights.read(placement.source, dtype, rows, columns)
    else:
        chosen = placement.rows[slice(*rows)]
        span = int(chosen.min()), int(chosen.max()) + 1
        source = weights.read(placement.source, dtype, span, columns)[chosen - span[0]]
    return source if source.ndim == 2 else source[:, None]


def contiguous(array: NDArray) -> NDArray:
    """The array itself, or a contiguous copy of a transposed view."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    _copy(out, array)
    return out


def _copy(out: NDArray, piece: NDArray) -> None:
    """``out[...] = piece``; a transposed piece square by square, because a cache holds no column of it."""
    if piece.flags.c_contiguous or min(piece.shape) <= 1:
        out[...] = piece
        return
    if fast_weights.HAS_KERNELS:
        from . import kernels  # numba takes a second to import

        if kernels.can_transpose(out, piece.T):
            kernels.transpose(out, piece.T)
            return
    for row in range(0, piece.shape[0], _TILE):
        for column in range(0, piece.shape[1], _TILE):
            square = slice(row, row + _TILE), slice(column, column + _TILE)
            out[square] = np.ascontiguousarray(piece.T[square[::-1]]).T


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
