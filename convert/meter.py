"""Where the time of a conversion goes: reading, computing or writing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .direct_reader import DirectReader

PHASES = ("read", "compute", "write")
_FORGET_BYTES = 1 << 20  # reads from this size on are not left in the page cache


class Meter:
    """Seconds that all threads together spent in each phase, and bytes read. Thread-safe.

    Phases nest: while an inner one runs, the outer one's clock stands still.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.read_bytes = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = getattr(self._local, "phase", None)
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def count_read(self, size: int) -> None:
        with self._lock:
            self.read_bytes += size

    def _switch(self, name: str | None) -> None:
        now = time.perf_counter()
        ended: str | None = getattr(self._local, "phase", None)
        if ended is not None:
            with self._lock:
                self.seconds[ended] += now - self._local.since
        self._local.phase, self._local.since = name, now


class MeteredReader(DirectReader):
    """A Reader that counts, and that keeps a checkpoint larger than memory from pushing everything out of the cache."""

    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter

    def _fill(self, path: Path, buffer: NDArray[np.uint8], offset: int) -> None:
        with self._meter.phase("read"):
            super()._fill(path, buffer, offset)
            if len(buffer) >= _FORGET_BYTES:
                os.posix_fadvise(self._open(path), offset, len(buffer), os.POSIX_FADV_DONTNEED)
        self._meter.count_read(len(buffer))

    def _fill_pages(self, path: Path, pages: NDArray[np.uint8], offset: int) -> int:
        with self._meter.phase("read"):
            count = super()._fill_pages(path, pages, offset)
        self._meter.count_read(count)
        return count
