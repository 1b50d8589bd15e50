"""``deepspan verify``: whether a checkpoint is what it should be, or what another one is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...convert.executor import default_workers
from ...convert.verify.against import Comparison, Difference, compare
from ...convert.verify.directory import Options, Verdict, verify
from ...convert.verify.views import View, open_view
from ...models.errors import DeepspanError, InputError
from ..options import path
from ..progress import Progress
from ..words import count

_LISTED = 50
_ALONE = {"source": "--source", "samples": "--samples", "seed": "--seed"}
_COMPARING = {"rtol": "--rtol", "drop_mtp": "--drop-mtp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit code 0 when everything is as it should be, 1 when something is damaged or differs."
    parser.add_argument("directory", metavar="DIR", type=path, help="a checkpoint in any layout")
    parser.add_argument(
        "--against", metavar="DIR", type=path, help="a second one, in any layout, to compare values with"
    )
    parser.add_argument(
        "--rtol", metavar="R", type=float, help="with --against: the relative error that is no difference"
    )
    parser.add_argument(
        "--drop-mtp", action="store_true", default=None, help="with --against: leave the MTP layers out"
    )
    parser.add_argument("--source", metavar="DIR", type=path, help="where the conversion's source is now")
    parser.add_argument("--samples", metavar="N", type=int, help="tensors to make again from the source (default 64)")
    parser.add_argument("--seed", metavar="S", type=int, help="which ones these are (default 0)")
    parser.add_argument("--config", metavar="FILE", help="config.json, or name, of the model of a DIR that has none")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=default_workers(), help="threads (default: one a core)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    for name, flag in (_ALONE if options.against else _COMPARING).items():
        if getattr(options, name) is not None:
            todo = "leave one of them out" if options.against else "give --against too"
            raise InputError(f"{flag} does not go {'with' if options.against else 'without'} --against", flag, todo)
    for name, least in (("rtol", 0), ("samples", 0), ("seed", 0), ("workers", 1)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} is {value}", f"--{name}", f"give {least} or more")
    directories = [directory for directory in (options.directory, options.against) if directory]
    if options.config and all((directory / "config.json").is_file() for directory in directories):
        raise InputError("the checkpoint has a config.json", "--config", "leave it out")
    return _compare(options) if options.against else _verify(options)


class _Phases:
    """Shows one phase of the work after the other; ``stack`` ends the last one."""

    def __init__(self, stack: ExitStack):
        self._stack = stack
        self._what: str | None = None

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._stack.close()
            self._what, self._progress = what, self._stack.enter_context(Progress(what, total))
        self._progress.show(done)


# One directory ------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    given = {name: value for name in _ALONE if (value := getattr(options, name)) is not None}
    with ExitStack() as stack:
        phases = _Phases(stack)
        settings = Options(**given, config=options.config, workers=options.workers)
        verdict = verify(options.directory, settings, phases.show)
    print(json.dumps(_verdict(verdict), ensure_ascii=False) if options.json else "\n".join(_verdict_lines(verdict)))
    if not verdict.is_sound:
        what = f"damaged: {count(len(verdict.findings), 'finding')}"
        raise DeepspanError(what, str(options.directory), "replace the files that are named")
    return 0


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "path": str(verdict.directory),
        "sound": verdict.is_sound,
        "layout": verdict.layout,
        "files": verdict.files,
        "tensors": verdict.tensors,
        "bytes": verdict.nbytes,
        "conversion": verdict.kind,
        "source": None if verdict.source is None else str(verdict.source),
        "recomputed": verdict.recomputed,
        "notes": verdict.notes,
        "findings": [dataclasses.asdict(finding) for finding in verdict.findings],
    }


def _verdict_lines(verdict: Verdict) -> Iterator[str]:
    read = f"{verdict.tensors:,} tensors in {count(verdict.files, 'file')}, {verdict.nbytes:,} bytes"
    yield f"checkpoint   {verdict.directory}"
    yield f"layout       {verdict.layout or 'unknown'}"
    yield f"read         {read}{', compared with the manifest' if verdict.kind else ''}"
    if verdict.source is not None:
        yield f"made again   rows of {count(verdict.recomputed, 'tensor')}, from {verdict.source} by {verdict.kind}"
    yield from (f"note         {note}" for note in verdict.notes)
    yield f"damage       {count(len(verdict.findings), 'finding') if verdict.findings else 'none'}"
    yield from _some(verdict.findings)


# Two ----------------------------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> int:
    first, second, rtol = options.directory, options.against, options.rtol or 0.0
    with ExitStack() as stack:
        a = stack.enter_context(open_view(first, _config(options, second)))
        b = stack.enter_context(open_view(second, _config(options, first)))
        elements = sum(param.size for param in a.params.values())
        phases = _Phases(stack.enter_context(ExitStack()))
        found = compare(
            a,
            b,
            options.workers,
            lambda done: phases.show("comparing, million elements", done // 10**6, elements // 10**6),
            mtp=not options.drop_mtp,
        )
    print(
        json.dumps(_comparison(a, b, found, rtol), ensure_ascii=False)
        if options.json
        else "\n".join(_comparison_lines(a, b, found, rtol))
    )
    if not found.is_equal(rtol):
        raise DeepspanError("the checkpoints differ", f"{first} and {second}", "see the list, or give a larger --rtol")
    return 0


def _config(options: argparse.Namespace, other: Path) -> str | None:
    """For a directory without a config.json: what is given, or that of the other directory."""
    config = other / "config.json"
    return options.config or (str(config) if config.is_file() else None)


def _comparison(a: View, b: View, found: Comparison, rtol: float) -> dict[str, Any]:
    return {
        "paths": [str(a.directory), str(b.directory)],
        "layouts": [a.layout, b.layout],
        "equal": found.is_equal(rtol),
        "rtol": rtol,
        "identical": found.identical,
        "within": [_difference(each) for each in found.differing if each.within(rtol)],
        "differing": [_difference(each) for each in found.differing if not each.within(rtol)],
        "missing": found.missing,
        "extra": found.extra,
    }


def _difference(each: Difference) -> dict[str, Any]:
    """JSON has no infinity."""
    numbers = {name: getattr(each, name) for name in ("max_error", "relative_error")}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"name": each.name, "what": each.what, **finite}


def _comparison_lines(a: View, b: View, found: Comparison, rtol: float) -> Iterator[str]:
    within = [each for each in found.differing if each.within(rtol)]
    beyond = [each for each in found.differing if not each.within(rtol)]
    beyond.sort(key=lambda each: -each.relative_error)
    yield f"checkpoint   {a.directory} ({a.layout})"
    yield f"against      {b.directory} ({b.layout})"
    yield f"identical    {count(found.identical, 'parameter')}"
    if rtol:
        yield f"within       {rtol:g}: {count(len(within), 'parameter')}{_worst(within)}"
    yield f"differing    {count(len(beyond), 'parameter')}{_worst(beyond)}"
    yield from _some(beyond)
    for title, names in (("missing", found.missing), ("extra", found.extra)):
        yield f"{title:<12} {count(len(names), 'parameter')}"
        yield from _some(names)


def _worst(differing: Sequence[Difference]) -> str:
    return f", relative error up to {max(each.relative_error for each in differing):.3g}" if differing else ""


def _some(items: Sequence[object]) -> Iterator[str]:
    yield from (f"    {item}" for item in items[:_LISTED])
    if len(items) > _LISTED:
        yield f"    and {len(items) - _LISTED:,} more (--json lists all)"
