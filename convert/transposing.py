"""Copying arrays that lie transposed, at the speed of memory where the ``speed`` extra is installed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import speed
from .pages import empty_pages

_TILE = 128  # a square of 16-bit elements that stays in the second-level cache, twice


def contiguous(array: NDArray) -> NDArray:
    """The array itself, or a contiguous copy of a transposed view."""
    if array.flags.c_contiguous:
        return array
    out = empty_pages(array.shape, array.dtype)
    put(out, array)
    return out


def put(out: NDArray, piece: NDArray) -> None:
    """``out[...] = piece``; a transposed piece square by square, because a cache holds no column of it."""
    if piece.flags.c_contiguous or min(piece.shape) <= 1:
        out[...] = piece
        return
    if speed.HAS_KERNELS:
        from . import kernels  # numba takes a second to import

        if kernels.can_transpose(out, piece.T):
            kernels.transpose(out, piece.T)
            return
    for row in range(0, piece.shape[0], _TILE):
        for column in range(0, piece.shape[1], _TILE):
            square = slice(row, row + _TILE), slice(column, column + _TILE)
            out[square] = np.ascontiguousarray(piece.T[square[::-1]]).T
