"""Verifying one directory: structure, hashes, degenerate values, and a sample made again from the source."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ...models.errors import InputError
from ..inspection import Inspection
from ..manifest import MANIFEST_FILE
from ..meter import Meter, MeteredReader
from ..safetensors import Reader
from .contents import check_contents
from .findings import Finding
from .recompute import Remake, check_samples, draw, open_source
from .recorded import Recorded, check_recorded, read_recorded
from .structure import check_structure, inspect_structure

# What is being done, how much of it is done, and how much there is: megabytes, or rows.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """``source`` is where the conversion's source is, if not where the manifest says.

    ``samples`` tensors are made again from it, chosen by ``seed``. ``config`` is a config.json, or a model's name, for
    directories without one.
    """

    source: Path | None = None
    samples: int = 64
    seed: int = 0
    config: str | None = None
    workers: int = 2


@dataclass
class Verdict:
    """``kind`` is None without a manifest, ``source`` when nothing was made again; ``recomputed`` counts samples.

    ``notes`` say what could not be checked.
    """

    directory: Path
    layout: str | None
    files: int
    tensors: int
    nbytes: int
    kind: str | None = None
    source: Path | None = None
    recomputed: int = 0
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.findings


def verify(directory: Path, options: Options, report: Report) -> Verdict:
    """Raises InputError for what is no checkpoint at all, and for a given source that is not the conversion's."""
    found = inspect_structure(directory, options.config)
    size = sum(info.nbytes for info in found.tensors)
    verdict = Verdict(directory, found.layout, len(found.headers), len(found.tensors), size)
    recorded = _recorded(verdict, options)
    verdict.findings += check_structure(found, options.config)
    if recorded is not None:
        verdict.findings += check_recorded(directory, recorded, found.headers)
    is_whole = verdict.is_sound
    checksums = {} if recorded is None else recorded.checksums
    with MeteredReader(Meter()) as reader, ExitStack() as stack:
        verdict.findings += check_contents(
            found.headers,
            checksums,
            reader,
            options.workers,
            lambda done: report("reading, MB", done // 10**6, size // 10**6),
        )
        if recorded is None or not options.samples:
            return verdict
        if not is_whole:
            verdict.notes.append("no values were made again from the source: the structure is damaged")
        elif (remake := _open_source(verdict, recorded, found, options, stack)) is not None:
            _recompute(verdict, found, remake, reader, options, report)
    return verdict


def _recorded(verdict: Verdict, options: Options) -> Recorded | None:
    try:
        recorded = read_recorded(verdict.directory)
    except InputError as fault:
        verdict.findings.append(Finding.of(fault))
        return None
    if recorded is not None:
        verdict.kind = recorded.kind
        return recorded
    if options.source is not None:
        where = str(verdict.directory)
        raise InputError(f"no {MANIFEST_FILE}, which says how it was converted", where, "leave --source out")
    verdict.notes.append(f"no {MANIFEST_FILE}: nothing to compare the bytes with")
    return None


def _open_source(
    verdict: Verdict, recorded: Recorded, found: Inspection, options: Options, stack: ExitStack
) -> Remake | None:
    """None, with a note, when the source is not where the manifest says."""
    source = options.source or recorded.source_directory
    if source is None or not (options.source or source.is_dir()):
        gone = "the manifest names no source" if source is None else f"the source {source} is gone"
        verdict.notes.append(f"no values were made again: {gone}; give --source")
        return None
    own = verdict.directory / "config.json"
    config = options.config or (str(own) if own.is_file() else None)
    try:
        remake, structure = open_source(source, recorded, found.headers, config, stack)
    except InputError as fault:
        if options.source:
            raise
        verdict.notes.append(f"no values were made again: {fault}")
        return None
    verdict.source = source
    if structure not in (None, recorded.structure):
        verdict.findings.append(Finding("its tensors are not those that the source is converted to", MANIFEST_FILE))
        return None
    return remake


def _recompute(
    verdict: Verdict, found: Inspection, remake: Remake, reader: Reader, options: Options, report: Report
) -> None:
    samples = draw(found.headers, options.samples, options.seed)
    for finding in check_samples(
        samples, remake, reader, options.workers, lambda done: report("making rows again", done, len(samples))
    ):
        verdict.recomputed += 1
        if finding is not None:
            verdict.findings.append(finding)
