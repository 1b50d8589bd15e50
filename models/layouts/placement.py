"""The one form in which a layout is written: target tensors made of placements of canonical parameters.

A placement only moves elements (choose rows and columns, transpose, put at an offset), so it is lossless, can be
streamed piece by piece, and its inverse follows from it: no layout is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Placement:
    """``target[index][offset:, …] = source[rows][:, columns]``, transposed when asked.

    ``rows`` chooses and orders the source's rows (None: all), ``columns`` is a range of its columns. The piece lands in
    the target's matrix ``index`` (None when the target is not a stack) at ``offset`` (row, column).
    """

    source: str
    rows: NDArray[np.int64] | None = None
    columns: tuple[int, int] | None = None
    transpose: bool = False
    index: int | None = None
    offset: tuple[int, int] = (0, 0)

    def take(self, source: NDArray) -> NDArray:
        """The piece as it lies in the target."""
        piece = source if self.rows is None else source[self.rows]
        if self.columns is not None:
            piece = piece[:, slice(*self.columns)]
        return piece.T if self.transpose else piece

    def give_back(self, source: NDArray, piece: NDArray) -> None:
        """The inverse of `take`: write a piece of the target into its place in the source."""
        piece = piece.T if self.transpose else piece
        columns = slice(None) if self.columns is None else slice(*self.columns)
        rows = slice(None) if self.rows is None else self.rows
        if source.ndim == 1:
            source[rows] = piece
        else:
            source[rows, columns] = piece

    def piece_shape(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        shape = list(source_shape)
        if self.rows is not None:
            shape[0] = len(self.rows)
        if self.columns is not None:
            shape[1] = self.columns[1] - self.columns[0]
        return tuple(reversed(shape)) if self.transpose else tuple(shape)

    def region(self, source_shape: Sequence[int]) -> tuple[int | slice, ...]:
        """Where the piece lies in the target, as an index expression."""
        shape = self.piece_shape(source_shape)
        inner = tuple(slice(start, start + size) for start, size in zip(self.offset, shape, strict=False))
        return inner if self.index is None else (self.index, *inner)


@dataclass(frozen=True, eq=False)
class TargetTensor:
    """One tensor of the other layout: name, file, shape, stored dtype, and the placements that fill it exactly once."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    placements: tuple[Placement, ...]


def deinterleaved(width: int) -> NDArray[np.int64]:
    """Row order that turns rope pairs (0, 1), (2, 3), … into halves: even rows first, then odd rows."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def head_rows(heads: int, head_width: int, inside: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows ``inside`` of every head of a head-major matrix, heads in order."""
    return (np.arange(heads)[:, None] * head_width + inside[None, :]).reshape(-1)


def assemble(target: TargetTensor, read: dict[str, NDArray]) -> NDArray:
    """The target from its sources, whole: the slow, obvious path that streaming writers are tested against."""
    first = read[target.placements[0].source]
    result = np.zeros(target.shape, first.dtype)
    for placement in target.placements:
        source = read[placement.source]
        result[placement.region(source.shape)] = placement.take(source)
    return result


def sources_of(targets: Iterable[TargetTensor]) -> Iterator[tuple[str, TargetTensor, Placement]]:
    """Every placement with its source's name first: the table that the inverse conversion is grouped by."""
    for target in targets:
        for placement in target.placements:
            yield placement.source, target, placement
