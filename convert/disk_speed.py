"""How fast the disks are, measured: for an estimate before a conversion that takes hours."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..models.errors import InputError

_SAMPLE_BYTES = 128 << 20
_CHUNK = 8 << 20
_STREAMS = 4


def read_speed(files: Iterable[Path]) -> float:
    """Bytes a second of cold reads from the first of ``files``, several at a time; little more than 0.1 s long."""
    chunks: list[tuple[int, int, int]] = []
    opened = []
    try:
        for path in files:
            if len(chunks) * _CHUNK >= _SAMPLE_BYTES:
                break
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            os.posix_fadvise(opened[-1], 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(opened[-1]).st_size
            chunks += [(opened[-1], start, min(_CHUNK, size - start)) for start in range(0, size, _CHUNK)]
        chunks = chunks[: _SAMPLE_BYTES // _CHUNK]
        started = time.perf_counter()
        with ThreadPoolExecutor(_STREAMS) as pool:
            size = sum(pool.map(lambda chunk: len(os.pread(chunk[0], chunk[2], chunk[1])), chunks))
        return size / (time.perf_counter() - started)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def write_speed(directory: Path) -> float | None:
    """Bytes a second that reach the disk of ``directory``, through a file without a name; None where there is none."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, _SAMPLE_BYTES)
        chunk = np.full(_CHUNK, 0x5A, np.uint8)
        started = time.perf_counter()
        for start in range(0, _SAMPLE_BYTES, _CHUNK):
            os.pwrite(descriptor, chunk.data, start)
        os.fdatasync(descriptor)
        return _SAMPLE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        raise InputError("cannot write", str(directory), error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def estimated_seconds(read_bytes: int, reading: float, write_bytes: int, writing: float, one_disk: bool) -> float:
    """The time that disks of these speeds need: together on two of them, one after the other on one."""
    times = read_bytes / reading, write_bytes / writing
    return sum(times) if one_disk else max(times)
