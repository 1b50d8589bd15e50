"""The output directory: what may be there before a conversion, what an earlier run left to keep, room for the rest."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import InputError
from .checkpoint import listed
from .journal import Journal, read_begin, read_published
from .manifest import MANIFEST_FILE, difference, read_manifest
from .plan import Plan, ShardPlan
from .writer import PARTIAL

_MARGIN_BYTES = 64 << 20
_MARGIN_FILES = 16
_ANOTHER = "choose another directory"


class Destination:
    """The directory of one run, locked. ``finished`` maps published shards to their tensors' checksums."""

    def __init__(self, directory: Path, begin: Mapping[str, Any], journal: Journal):
        self.directory = directory
        self.begin = begin
        self.is_complete = False
        self.finished: dict[str, Mapping[str, str]] = {}
        self.run = uuid.uuid4().hex[:12]
        self._journal = journal

    def __enter__(self) -> Destination:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def record(self, shard: ShardPlan, checksums: Mapping[str, str]) -> None:
        """Note in the journal that a shard is published."""
        self._journal.record(shard, checksums)
        self.finished[shard.name] = checksums

    def complete(self) -> None:
        """The manifest is written, and the directory no longer looks unfinished."""
        self._journal.remove()
        self.is_complete = True


def open_destination(
    plan: Plan, directory: Path, begin: Mapping[str, Any], resume: bool, overwrite: bool
) -> Destination:
    """Check and lock ``directory``, which is created when absent; take over what an earlier run of this plan finished.

    Nothing that is there already is replaced unless ``overwrite``, and nothing of another origin is ever removed.
    """
    check_directory(plan, directory, begin, resume, overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory)
    try:
        earlier = _of_earlier_conversion(directory)
        # Looked at again, now that nobody else can write: another run may have ended in between.
        state = None if overwrite else _state(plan, directory, begin, journal.begin)
        destination = Destination(directory, begin, journal)
        if state == "complete":
            destination.complete()
        elif state == "unfinished":
            destination.finished = {
                shard.name: checksums for shard in plan.shards if (checksums := journal.finished(shard)) is not None
            }
        else:
            journal.start(begin)
        if overwrite:
            _clear(plan, directory, earlier)
        for leftover in _leftovers(plan, directory):
            leftover.unlink()
    except BaseException:
        journal.close()
        raise
    return destination


def check_directory(plan: Plan, directory: Path, begin: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise InputError unless the plan may be carried out in ``directory`` and fits on its disk. Writes nothing."""
    if directory.exists() and not directory.is_dir():
        raise InputError("not a directory", str(directory), _ANOTHER)
    if directory.resolve() == plan.source.directory.resolve():
        raise InputError("source and destination are the same directory", str(directory), _ANOTHER)
    present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    planned = {MANIFEST_FILE, *plan.small_files, *(shard.name for shard in plan.shards)}
    state = None if overwrite else _state(plan, directory, begin, read_begin(directory))
    others = present - planned - (_of_earlier_conversion(directory) if overwrite else set())
    if foreign := sorted(name for name in others if name.endswith((".safetensors", ".index.json"))):
        todo = f"remove them, or {_ANOTHER}"
        raise InputError(f"files of another checkpoint: {listed(foreign)}", str(directory), todo)
    if state is None and not overwrite and (colliding := sorted(present & planned)):
        todo = f"{_ANOTHER}, or give --overwrite"
        raise InputError(f"files are there already: {listed(colliding)}", str(directory), todo)
    if state == "unfinished" and not resume:
        todo = f"let it be resumed, {_ANOTHER}, or give --overwrite"
        raise InputError("an unfinished conversion is there", str(directory), todo)
    _check_room(plan, directory, present if state else set())


def _state(plan: Plan, directory: Path, begin: Mapping[str, Any], journaled: Mapping[str, Any] | None) -> str | None:
    """``complete`` or ``unfinished`` for an earlier run of the same conversion; InputError for one of another."""
    finished = read_manifest(directory)
    other = None if finished is None else difference(finished, begin)
    if finished is not None and other is None:
        _check_still_whole(plan, directory)
        return "complete"
    unfinished_other = None if journaled is None else difference(journaled, begin)
    if journaled is not None and unfinished_other is None:
        return "unfinished"
    if reason := unfinished_other or other:
        todo = f"{_ANOTHER}, or give --overwrite to start over"
        raise InputError(f"holds another conversion: {reason}", str(directory), todo)
    return None


def _check_still_whole(plan: Plan, directory: Path) -> None:
    sizes = {entry.name: entry.stat().st_size for entry in directory.iterdir()}
    if damaged := [shard.name for shard in plan.shards if sizes.get(shard.name) != shard.nbytes]:
        what = f"was converted completely and has changed since: {listed(damaged)}"
        raise InputError(what, str(directory), "give --overwrite to convert again")


def _of_earlier_conversion(directory: Path) -> set[str]:
    """Files of ``directory`` that a conversion wrote, as its manifest or its journal says."""
    if not directory.exists():
        return set()
    finished = read_manifest(directory) or {}
    written = {*finished.get("files", ()), *finished.get("small_files", ()), *read_published(directory)}
    return written & {entry.name for entry in directory.iterdir()}


def _clear(plan: Plan, directory: Path, earlier: set[str]) -> None:
    """Remove what would make the directory look complete while it is overwritten, and what would be left over."""
    replaced = {shard.name for shard in plan.shards}
    for name in {MANIFEST_FILE, *plan.small_files, *earlier} - replaced:
        (directory / name).unlink(missing_ok=True)


def _leftovers(plan: Plan, directory: Path) -> list[Path]:
    """Unfinished files of runs that were killed."""
    planned = {MANIFEST_FILE, *plan.small_files, *(shard.name for shard in plan.shards)}
    return [path for path in directory.glob(f"*{PARTIAL}*") if path.name.partition(PARTIAL)[0] in planned]


def _check_room(plan: Plan, directory: Path, present: set[str]) -> None:
    """Blocks and inodes for what is not there yet."""
    missing = [shard for shard in plan.shards if shard.name not in present]
    reclaimed = sum(path.stat().st_blocks * 512 for path in _leftovers(plan, directory)) if directory.exists() else 0
    needed = sum(shard.nbytes for shard in missing) + _MARGIN_BYTES - reclaimed
    free = free_space(directory)
    if needed > free.bytes:
        what = f"needs {needed / 1e9:.2f} GB and {free.bytes / 1e9:.2f} GB are free"
        raise InputError(what, str(directory), "free space, or choose another disk")
    files = len(missing) + len(plan.small_files) + _MARGIN_FILES
    if free.files is not None and files > free.files:
        raise InputError(f"needs {files} files and {free.files} inodes are free", str(directory), "choose another disk")


@dataclass(frozen=True)
class FreeSpace:
    """What a user without special rights may still use; ``files`` is None where a file system has no such limit."""

    bytes: int
    files: int | None


def free_space(directory: Path) -> FreeSpace:
    """Room on the disk of a directory that need not exist yet."""
    found = os.statvfs(existing_parent(directory))
    return FreeSpace(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)


def existing_parent(directory: Path) -> Path:
    """The directory itself, or the nearest one above that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
