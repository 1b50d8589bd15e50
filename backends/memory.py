"""Memory checks on the host, made before anything large is allocated."""

from __future__ import annotations

import psutil

from ..models.errors import InputError

GIB = 2**30


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
