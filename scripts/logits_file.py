"""Logits on disk: an ``.npz`` with ``logits`` [tokens, vocab] float32 and ``token_ids`` [tokens] int32."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backends.base import FloatArray, IntArray
from ..models.errors import InputError


@dataclass(frozen=True)
class LogitsFile:
    """``token_ids`` is None in files that other programs wrote without it."""

    logits: FloatArray
    token_ids: IntArray | None


def check_writable(path: Path, overwrite: bool) -> None:
    """Refuse an output file that exists, or whose folder does not, before any work is done for it."""
    if path.exists() and not overwrite:
        raise InputError("the file exists", str(path), "choose another name, or give --overwrite")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError("not a place for a file", str(path), "name a file in a folder that exists")
    if not os.access(path.parent, os.W_OK):
        raise InputError("no permission to write", str(path.parent), "choose another folder")


def write_logits(path: Path, logits: FloatArray, token_ids: Sequence[int]) -> None:
    """Write the whole file or none: it gets its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, logits=logits, token_ids=np.asarray(token_ids, np.int32))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_logits(path: Path) -> LogitsFile:
    """Raises InputError for anything but such a file."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            found = {name: arrays[name] for name in ("logits", "token_ids") if name in arrays}
    except OSError as error:
        raise InputError("cannot read", str(path), error.strerror or str(error)) from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise InputError("not an .npz file", str(path), "give a file that deepspan logits wrote") from None
    logits = found.get("logits")
    if logits is None or logits.ndim != 2 or not logits.size or not np.issubdtype(logits.dtype, np.floating):
        raise InputError("no logits of [tokens, vocab]", str(path), "give a file that deepspan logits wrote")
    return LogitsFile(logits.astype(np.float32), found.get("token_ids"))
