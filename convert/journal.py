"""The journal of an unfinished conversion: which files are done, proven by what was written, never by "it exists".

One JSON object a line, each line synced. The first says what is being converted to what; each later one, which shard
is finished. The journal's name marks the directory as unfinished; its lock keeps a second writer out.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.errors import InputError
from .plan import ShardPlan
from .strict_json import StrictJsonError, parse_object

JOURNAL_FILE = "conversion.partial.jsonl"


class Journal:
    """The journal of ``directory``, open and locked until it is closed. Thread-safe."""

    def __init__(self, directory: Path):
        self._path = directory / JOURNAL_FILE
        self._lock = threading.Lock()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise InputError(
                "another conversion is writing here", str(directory), "wait for it or choose another"
            ) from error
        self._entries = self._read()

    def close(self) -> None:
        os.close(self._file)

    @property
    def begin(self) -> Mapping[str, Any] | None:
        """What the unfinished conversion converts; None in a new journal."""
        return self._entries[0] if self._entries else None

    def start(self, begin: Mapping[str, Any]) -> None:
        """Forget everything and begin anew."""
        os.ftruncate(self._file, 0)
        self._entries = []
        self._append(begin)

    def record(self, shard: ShardPlan, checksums: Mapping[str, str]) -> None:
        """A shard is published."""
        self._append(
            {"file": shard.name, "bytes": shard.nbytes, "header": shard.header_hash, "tensors": dict(checksums)}
        )

    def finished(self, shard: ShardPlan) -> Mapping[str, str] | None:
        """The checksums of a shard that was published, is still there and has the planned header; else None."""
        recorded = [entry for entry in self._entries[1:] if entry["file"] == shard.name]
        path = self._path.parent / shard.name
        if not recorded or recorded[-1]["header"] != shard.header_hash:
            return None
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        with path.open("rb") as file:
            if file.read(len(shard.header)) != shard.header:
                return None
        checksums: Mapping[str, str] = recorded[-1]["tensors"]
        return checksums

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._entries.append(dict(entry))
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def _read(self) -> list[dict[str, Any]]:
        """The entries; a last line that was cut off by a crash is removed."""
        raw = self._path.read_bytes()
        whole, newline, _ = raw.rpartition(b"\n")
        os.ftruncate(self._file, len(whole) + len(newline))
        return _entries(whole, self._path)


def read_begin(directory: Path) -> Mapping[str, Any] | None:
    """The first entry of the journal of ``directory``, None without one. Takes no lock and writes nothing."""
    entries = _read_unlocked(directory)
    return entries[0] if entries else None


def read_published(directory: Path) -> list[str]:
    """The shards that the journal of ``directory`` calls published. Takes no lock and writes nothing."""
    return [entry["file"] for entry in _read_unlocked(directory)[1:]]


def _read_unlocked(directory: Path) -> list[dict[str, Any]]:
    path = directory / JOURNAL_FILE
    return _entries(path.read_bytes().rpartition(b"\n")[0], path) if path.is_file() else []


def _entries(lines: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_object(line) for line in lines.split(b"\n") if line]
    except StrictJsonError as error:
        raise InputError(
            f"not a journal of a conversion ({error})", str(path), "remove it, or choose another directory"
        ) from error
