"""Files whose whole pages are written around the page cache where the file system can."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

from ..models.dtypes import Bits8
from .pages import direct_part, empty_pages, is_aligned

_RUN_BYTES = 4 << 20  # moved at a time to where a disk takes it
_SYNC_BYTES = 256 << 20  # written through the cache between syncs, so that dirty pages never pile up


class OutputFile:
    """A new file. Thread-safe; every method raises OSError when the disk refuses."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None
        self._spare = threading.local()
        self._lock = threading.Lock()
        self._unsynced = 0

    def reserve(self, size: int) -> None:
        """Allocate the whole file, so that a full disk shows before the work is done."""
        os.posix_fallocate(self._file, 0, size)

    def write(self, data: Bits8, offset: int) -> None:
        """The bytes of a contiguous array; its whole pages directly where the file system allows it."""
        done = 0
        while done < len(data):
            done += self._write_some(data[done:], offset + done)

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

    def _write_some(self, data: Bits8, offset: int) -> int:
        """Write a first part; how many bytes."""
        before, whole = direct_part(offset, len(data))
        if not self._is_direct or not whole:
            return self._write_cached(data, offset)
        return self._write_cached(data[:before], offset) if before else self._write_direct(data[:whole], offset)

    def _write_direct(self, data: Bits8, offset: int) -> int:
        assert self._direct is not None
        try:
            return os.pwrite(self._direct, (data if is_aligned(data) else self._aligned(data)).data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._is_direct = False  # a disk with other alignments
            return 0

    def _aligned(self, data: Bits8) -> Bits8:
        """A copy of a first part, in pages that each thread keeps."""
        if not hasattr(self._spare, "pages"):
            self._spare.pages = empty_pages((_RUN_BYTES,), np.uint8)
        copy: Bits8 = self._spare.pages[: len(data)]
        copy[:] = data[:_RUN_BYTES]
        return copy

    def _write_cached(self, data: Bits8, offset: int) -> int:
        count = os.pwrite(self._file, data.data, offset)
        with self._lock:
            self._unsynced += count
            due = self._unsynced >= _SYNC_BYTES
            if due:
                self._unsynced = 0
        if due:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        return count


def _open_direct(path: Path) -> int | None:
    """A second descriptor that goes around the cache; None where the file system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
