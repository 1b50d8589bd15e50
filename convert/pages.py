"""Memory for direct I/O: whole pages go between it and a disk without a copy in the page cache.

The cache is copied to and from page by page, which takes more of a processor than all else that a conversion does, and
serves nobody: a checkpoint is larger than the cache, and is not read again soon.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from math import prod

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..models.dtypes import Bits8

PAGE = 4096  # bytes; no usual disk has larger blocks
LEAST_BYTES = 1 << 20  # less would wait for the disk longer than the copy takes
_HUGE_PAGE = 2 << 20  # a disk takes many of these at once, but only some pages
_ALIGNMENT = 512  # of memory that a disk takes


class _Spare(threading.local):
    """Blocks that a thread has used and can use again: the system clears what it gives, page by page."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []


_spare = _Spare()


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
    """`np.empty` from the start of a page on. Large memory goes back to the thread when no array uses it any more."""
    size = prod(shape) * np.dtype(dtype).itemsize
    if size < _HUGE_PAGE:
        memory, unit = np.empty(size + PAGE, np.uint8), PAGE
    else:
        memory, unit = _large(size + _HUGE_PAGE), _HUGE_PAGE
    start = -memory.ctypes.data % unit
    return memory[start : start + size].view(dtype).reshape(shape)


def _large(size: int) -> Bits8:
    blocks = _spare.blocks
    fitting = [block for block in blocks if size <= len(block) <= size + size // 2]  # none is wasted on small data
    if fitting:
        block = min(fitting, key=len)
        blocks.remove(block)
    else:
        blocks.clear()  # so that they do not add up while sizes grow
        block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(block, np.uint8)
    weakref.finalize(memory, blocks.append, block)
    return memory


def direct_part(offset: int, size: int) -> tuple[int, int]:
    """Of a range of a file, the part that is worth direct I/O: (bytes ahead of it, its bytes, 0 for none)."""
    before = -offset % PAGE
    whole = (size - before) // PAGE * PAGE
    return before, whole if whole >= LEAST_BYTES else 0


def is_aligned(data: Bits8) -> bool:
    """Whether a disk takes the memory where it is."""
    return bool(data.ctypes.data % _ALIGNMENT == 0)
