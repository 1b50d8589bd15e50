"""Memory in whole pages, between which and a disk nothing needs to be copied."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import DTypeLike, NDArray

PAGE = 4096  # bytes; no usual disk has larger blocks


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
    """`np.empty` from the start of a page on."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size].view(dtype).reshape(shape)
