"""Files that are written around the page cache: the disk takes data where it lies in memory.

What goes through the cache is copied page by page, which takes more of a processor than all else that a conversion
does, and serves nobody: a checkpoint is larger than the cache, and is not read again soon.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

from ..models.dtypes import Bits8
from .pages import PAGE, empty_pages

_ALIGNMENT = 512  # of memory that a disk takes
_RUN_BYTES = 4 << 20  # moved at a time to where a disk takes it
_LEAST_BYTES = 1 << 20  # a smaller write would wait for the disk longer than the copy takes
_SYNC_BYTES = 256 << 20  # written through the cache between syncs, so that dirty pages never pile up


class OutputFile:
    """A new file. Thread-safe; every method raises OSError when the disk refuses."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None
        self._lock = threading.Lock()
        self._unsynced = 0

    def reserve(self, size: int) -> None:
        """Allocate the whole file, so that a full disk shows before the work is done."""
        os.posix_fallocate(self._file, 0, size)

    def write(self, data: Bits8, offset: int) -> None:
        """The bytes of a contiguous array; its whole pages directly where the file system allows it."""
        view, address, done = data.data, data.ctypes.data, 0
        while done < len(view):
            done += self._write_some(view[done:], offset + done, address + done)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._file, size, offset)

    def sync(self) -> None:
        """Wait until everything is on the disk, and leave nothing of it in the cache."""
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def _write_some(self, view: memoryview, offset: int, address: int) -> int:
        """Write a first part; how many bytes."""
        before = -offset % PAGE
        whole = (len(view) - before) // PAGE * PAGE
        if not self._is_direct or whole < _LEAST_BYTES:
            return self._write_cached(view, offset)
        if before:
            return self._write_cached(view[:before], offset)
        return self._write_direct(view[:whole] if address % _ALIGNMENT == 0 else _aligned(view[:whole]), offset)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        assert self._direct is not None
        try:
            return os.pwrite(self._direct, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._is_direct = False  # a disk with other alignments
            return 0

    def _write_cached(self, view: memoryview, offset: int) -> int:
        count = os.pwrite(self._file, view, offset)
        with self._lock:
            self._unsynced += count
            due = self._unsynced >= _SYNC_BYTES
            if due:
                self._unsynced = 0
        if due:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        return count


def _aligned(view: memoryview) -> memoryview:
    """A copy of a first part that a disk takes."""
    part = np.frombuffer(view[:_RUN_BYTES], np.uint8)
    copy = empty_pages(part.shape, np.uint8)
    copy[:] = part
    return copy.data


def _open_direct(path: Path) -> int | None:
    """A second descriptor that goes around the cache; None where the file system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
