"""The host's memory: how much is free, checked before anything large is allocated, and how fast it is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

from ..models.errors import InputError

GIB = 2**30
_COPY_BYTES = 256 << 20  # far more than any cache
_COPY_REPEATS = 5


def check_memory(needed_bytes: int, what: str) -> None:
    """Refuse what does not fit into the memory that is free now; ``what`` names it in the message."""
    free = psutil.virtual_memory().available
    if needed_bytes > free:
        raise InputError(
            f"not enough memory: {needed_bytes / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free",
            what,
            f"{(needed_bytes - free) / GIB:.1f} GiB are missing: lower engine.max_batch or engine.max_seq_len, "
            "or use a machine with more memory",
        )


def host_copy_bandwidth() -> float:
    """Bytes a second, read and written, when all cores copy a large array together; the best of a few times."""
    cores = psutil.cpu_count() or 1
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(_COPY_REPEATS):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            best = min(best, time.perf_counter() - start)
    return 2 * _COPY_BYTES / best


def describe_host() -> str:
    """The processor as a device, in a line: cores and memory."""
    memory = psutil.virtual_memory()
    return f"cpu: {psutil.cpu_count()} cores, {memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB of it free"
