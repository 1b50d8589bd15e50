"""Reading around the page cache what is not in it already."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..models.dtypes import Bits8
from .pages import LEAST_BYTES, PAGE, empty_pages
from .safetensors import Reader

_WORD = 8  # bytes that every dtype is aligned to


class DirectReader(Reader):
    """A Reader whose large reads bypass the page cache where the file system can."""

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[Path, int | None] = {}

    def close(self) -> None:
        super().close()
        with self._lock:
            for descriptor in self._direct.values():
                if descriptor is not None:
                    os.close(descriptor)
            self._direct.clear()

    def _take(self, path: Path, offset: int, size: int) -> Bits8:
        if size < LEAST_BYTES or offset % _WORD or self._is_cached(path, offset + size // 2):
            return super()._take(path, offset, size)
        lead = offset % PAGE
        pages = empty_pages((-(-(lead + size) // PAGE) * PAGE,), np.uint8)
        taken = pages[lead : lead + size]
        done = max(0, self._fill_pages(path, pages, offset - lead) - lead)
        if done < size:  # whatever the reason is, the usual way meets it too and names it
            self._fill(path, taken[done:], offset + done)
        return taken

    def _fill_pages(self, path: Path, pages: Bits8, offset: int) -> int:
        """Read from the page at ``offset`` on; how many bytes came, fewer at the end of the file and after a fault."""
        descriptor = self._open_direct(path)
        if descriptor is None:
            return 0
        try:
            return os.preadv(descriptor, [pages.data], offset)
        except OSError:
            return 0

    def _is_cached(self, path: Path, offset: int) -> bool:
        try:
            return os.preadv(self._open(path), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def _open_direct(self, path: Path) -> int | None:
        with self._lock:
            if path not in self._direct:
                try:
                    self._direct[path] = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                except OSError:
                    self._direct[path] = None
            return self._direct[path]
