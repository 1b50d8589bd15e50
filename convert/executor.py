"""Running a plan: check, stream with several workers, publish.

The result has the same bytes for any number of workers and after any interruption: each piece is a pure function of the
source and has its own place in its file.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..models.errors import InputError
from .checkpoint import listed
from .destination import Destination, check_directory, open_destination
from .manifest import MANIFEST_FILE, begin_record, manifest
from .plan import Output, Plan
from .writer import ShardWriter, write_small

_REPORT_S = 0.1


@dataclass(frozen=True)
class Progress:
    """A moment of a conversion; bytes and seconds are of this run, what an earlier one finished left out."""

    done_bytes: int
    total_bytes: int
    seconds: float
    phases: Mapping[str, float]  # thread-seconds of read, compute and write

    @property
    def bound_by(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass(frozen=True)
class Result:
    """What a run did. ``kept_bytes`` were finished before it; nothing was written when these are all."""

    written_bytes: int
    kept_bytes: int
    read_bytes: int
    seconds: float
    phases: Mapping[str, float]


def default_workers() -> int:
    """One worker a core, and two more, because some always wait for the disk."""
    return min(32, len(os.sched_getaffinity(0)) + 2)


def run_plan(
    plan: Plan,
    directory: Path,
    workers: int | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Make ``directory`` what the plan says.

    Raises InputError before anything is written when the plan, the source or the directory does not fit; DeepspanError
    when reading or writing fails, with nothing unfinished under a final name.
    """
    started = time.perf_counter()
    begin = begin_record(plan)
    check_directory(plan, directory, begin, resume, overwrite)
    for check in plan.checks:
        check()
    with open_destination(plan, directory, begin, resume, overwrite) as destination:
        if destination.is_complete:
            return Result(0, plan.write_bytes, 0, time.perf_counter() - started, plan.meter.seconds)
        kept = sum(shard.nbytes for shard in plan.shards if shard.name in destination.finished)
        streaming = _Stream(plan, destination)
        streaming.run(workers or default_workers(), report)
        _check_unchanged(plan, begin)
        _publish(plan, destination)
    seconds = time.perf_counter() - started
    return Result(streaming.written, kept, plan.meter.read_bytes, seconds, dict(plan.meter.seconds))


class _Stream:
    """The workers and what they share."""

    def __init__(self, plan: Plan, destination: Destination):
        self.written = 0
        self._plan = plan
        self._destination = destination
        self._total = sum(s.nbytes for s in plan.shards if s.name not in destination.finished)
        self._open: set[ShardWriter] = set()
        self._pieces = self._all_pieces()
        self._lock = threading.Lock()  # for everything above
        self._error: BaseException | None = None

    def run(self, workers: int, report: Callable[[Progress], None]) -> None:
        started = time.perf_counter()
        threads = [threading.Thread(target=self._work, name=f"convert-{i}") for i in range(workers)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                threads[0].join(_REPORT_S)
                threads = [thread for thread in threads if thread.is_alive()]
                seconds = time.perf_counter() - started
                report(Progress(self.written, self._total, seconds, dict(self._plan.meter.seconds)))
        except BaseException as error:  # an interrupt, or a report that failed
            self._stop(error)
        finally:
            for thread in threads:
                thread.join()
        if self._error is not None:
            for writer in self._open:
                writer.abandon()
            raise self._error

    def _all_pieces(self) -> Iterator[tuple[ShardWriter, Output, int, int]]:
        """Every piece of every unfinished shard, in order; a shard's file is created when its turn comes."""
        for shard in self._plan.shards:
            if shard.name in self._destination.finished:
                continue
            writer = ShardWriter(self._destination.directory, shard, self._destination.run)
            self._open.add(writer)
            if writer.is_filled:  # tensors without elements only
                self._finish(writer)
            for output in sorted(shard.outputs, key=lambda output: output.after):
                for start, stop in output.pieces():
                    yield writer, output, start, stop

    def _work(self) -> None:
        meter = self._plan.meter
        try:
            while (piece := self._next()) is not None:
                writer, output, start, stop = piece
                with meter.phase("compute"):
                    rows = output.make(start, stop)
                with meter.phase("write"):
                    is_last = writer.write(output, start, rows)
                    with self._lock:
                        self.written += rows.nbytes
                    del rows  # not held while the next ones are made
                    if is_last:
                        self._finish(writer)
        except BaseException as error:
            self._stop(error)

    def _next(self) -> tuple[ShardWriter, Output, int, int] | None:
        with self._lock:
            return None if self._error is not None else next(self._pieces, None)

    def _finish(self, writer: ShardWriter) -> None:
        checksums = writer.publish()
        self._open.discard(writer)
        self._destination.record(writer.plan, checksums)

    def _stop(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error


def _check_unchanged(plan: Plan, begin: Mapping[str, object]) -> None:
    before, now = begin["source"], plan.source.identity()
    assert isinstance(before, dict)
    if changed := [name for name in now if before[name] != now[name]]:
        where = str(plan.source.directory)
        raise InputError(f"the source changed while it was read: {listed(changed)}", where, "start again")


def _publish(plan: Plan, destination: Destination) -> None:
    """The small files, the manifest last; then the directory is complete."""
    directory = destination.directory
    small = {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in plan.small_files.items()
    }
    for name, content in small.items():
        write_small(directory, name, content)
    write_small(directory, MANIFEST_FILE, manifest(plan, destination.begin, destination.finished, small))
    destination.complete()
