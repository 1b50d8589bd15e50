"""A sample of a conversion's rows, made again from its source by a slow path that shares nothing with the fast one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.layouts.placement import TargetTensor
from ...models.layouts.recognise import mindspore_targets, recognise
from ...models.spec import ModelSpec
from ..allowances import Allowances
from ..checkpoint import listed
from ..formats import Range
from ..golden_stick import GoldenStickReader, plain_names
from ..kinds import KINDS, demo_to_hf
from ..kinds.mindspore import open_mindspore
from ..kinds.options import Options
from ..kinds.source import HuggingFaceSource, open_huggingface, source_model
from ..manifest import CONVERTER, MANIFEST_FILE
from ..meter import Meter
from ..plan import SourceFiles
from ..safetensors import Header, Reader, TensorInfo
from .findings import Finding, in_parallel
from .recorded import Recorded
from .remake import (
    canonical_rows,
    golden_stick_rows,
    layout_rows,
    merged_rows,
    quantised_rows,
    rank_rows,
    rank_sources,
)
from .slow_layouts import FromHuggingFace, FromMindSpore, unfolded

_ELEMENTS = 64  # of a vector; of a matrix a whole row is made again
_WORKERS = 4  # at most: the slow path may hold an expert several times in FP32
# Rows of a tensor of the result, seen as a matrix; None where the source alone does not decide them.
Remake = Callable[[TensorInfo, Range], "NDArray | None"]
Headers = Mapping[str, Header]


def open_source(
    directory: Path, recorded: Recorded, headers: Headers, config: str | None, stack: ExitStack
) -> tuple[Remake, str | None]:
    """How to make the tensors of ``headers`` again, and the structure that their conversion is planned with now.

    The structure is None where planning needs more than the source. ``stack`` closes the source. Raises InputError when
    it is not the one that was recorded, or cannot be read as it was.
    """
    if recorded.kind not in _OPENERS:
        raise InputError(f"unknown kind of conversion {recorded.kind!r}", MANIFEST_FILE, "use a newer deepspan")
    options = _options(recorded, None if (directory / "config.json").is_file() else config)
    files, remake = _OPENERS[recorded.kind](directory, options, headers, stack)
    _check_identity(files, recorded)
    if "calibration" in recorded.options or recorded.converter != CONVERTER:
        return remake, None
    plan = KINDS[recorded.kind].plan(directory, options)
    plan.close()
    return remake, plan.structure_hash()


def _options(recorded: Recorded, config: str | None) -> Options:
    known = {field.name for field in fields(Options)} - {"calibration", "config"}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in recorded.options.items()
        if name in known
    }
    return Options(**values, config=config)


def _check_identity(files: SourceFiles, recorded: Recorded) -> None:
    """Sizes and headers must be those of the manifest; copies have other times, and another --config another place."""
    now = files.identity()
    names = {*recorded.source, *now} - {"config.json"}
    if changed := sorted(name for name in names if _without_time(recorded.source, name) != _without_time(now, name)):
        what = f"not the source of this conversion, or changed since: {listed(changed)}"
        raise InputError(what, str(files.directory), "give --source with the directory that was converted")


def _without_time(identity: Mapping[str, Any], name: str) -> list[Any]:
    found = identity.get(name)
    return [found[0], found[2]] if isinstance(found, list) and len(found) == 3 else []


# Openers ------------------------------------------------------------------------------------------------------------

Opened = tuple[SourceFiles, Remake]


def _open_huggingface(directory: Path, options: Options, stack: ExitStack) -> HuggingFaceSource:
    source = open_huggingface(directory, options, Allowances(options.allow))
    stack.callback(source.checkpoint.close)
    return source


def _to_huggingface(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    source = _open_huggingface(directory, options, stack)
    return source.files, partial(canonical_rows, FromHuggingFace(source))


def _to_mindspore(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    source = _open_huggingface(directory, options, stack)
    targets = _targets(headers, source.spec, source.has_mtp)
    return source.files, partial(layout_rows, FromHuggingFace(source), targets)


def _quantised(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    source = _open_huggingface(directory, options, stack)
    canonical = FromHuggingFace(source)
    if options.format != "w8a8-mindspore":
        assert options.format is not None, "quantize records its format"
        return source.files, partial(quantised_rows, canonical, options.format)
    targets = _targets(headers, source.spec, source.has_mtp)
    return source.files, partial(golden_stick_rows, canonical, targets, _names(headers))


def _to_ranks(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    source = _open_huggingface(directory, options, stack)
    assert options.ranks is not None, "hf-to-demo records its ranks"
    return source.files, partial(rank_rows, source, rank_sources(source, options.ranks), options.ranks)


def _from_mindspore(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    source = open_mindspore(directory, options, Allowances(options.allow))
    stack.callback(source.checkpoint.close)
    reader = GoldenStickReader(Meter())
    stack.callback(reader.close)
    canonical = FromMindSpore(source, reader)
    if recognise(headers, _names(headers)) == "huggingface":
        return source.files, partial(canonical_rows, canonical)
    has_mtp = source.has_mtp and not options.drop_mtp
    return source.files, partial(layout_rows, canonical, _targets(headers, source.model.spec, has_mtp))


def _from_ranks(directory: Path, options: Options, headers: Headers, stack: ExitStack) -> Opened:
    model = source_model(directory, options)
    reader = Reader()
    stack.callback(reader.close)
    ranks = demo_to_hf.open_ranks(directory, reader)
    files = SourceFiles(directory, {header.path.name: header for header in ranks}, model.path)
    return files, partial(merged_rows, ranks, reader, model.spec)


_OPENERS: Mapping[str, Callable[[Path, Options, Headers, ExitStack], Opened]] = {
    "fp8-to-bf16": _to_huggingface,
    "dequantize": _to_huggingface,
    "hf-to-mindspore": _to_mindspore,
    "quantize": _quantised,
    "hf-to-demo": _to_ranks,
    "mindspore-to-hf": _from_mindspore,
    "train-to-infer": _from_mindspore,
    "demo-to-hf": _from_ranks,
}
assert _OPENERS.keys() == KINDS.keys(), "a kind that cannot be verified"


def _names(headers: Headers) -> set[str]:
    return {name for header in headers.values() for name in header.tensors}


def _targets(headers: Headers, spec: ModelSpec, has_mtp: bool) -> dict[str, TargetTensor]:
    names = plain_names(_names(headers))
    layout = recognise(headers, names)
    if layout is None or not layout.startswith("mindspore"):
        raise InputError("not a MindSpore layout, as its kind says", MANIFEST_FILE, "convert again")
    return {target.name: target for target in mindspore_targets(layout, spec, has_mtp, names)}


# Sampling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    info: TensorInfo
    rows: Range  # of the tensor as a matrix


def draw(headers: Headers, count: int, seed: int) -> list[Sample]:
    """``count`` tensors, or all, and a row of each (of a vector, some elements), in the order of the files."""
    tensors = [info for header in headers.values() for info in header.tensors.values() if info.nbytes]
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(tensors), min(count, len(tensors)), replace=False))
    return [Sample(tensors[i], _row(tensors[i], rng)) for i in chosen]


def _row(info: TensorInfo, rng: np.random.Generator) -> Range:
    rows = unfolded(info).shape[0]
    length = min(rows, _ELEMENTS) if len(info.shape) == 1 else 1
    start = int(rng.integers(rows - length + 1))
    return start, start + length


def check_samples(
    samples: list[Sample], remake: Remake, reader: Reader, workers: int, report: Callable[[int], None]
) -> Iterator[Finding | None]:
    """For each sample that the source decides: what is wrong with it, or None. ``report`` gets the number done."""
    work = partial(_check, remake, reader)
    for done, (is_decided, finding) in enumerate(in_parallel(work, samples, min(workers, _WORKERS)), 1):
        report(done)
        if is_decided:
            yield finding


def _check(remake: Remake, reader: Reader, sample: Sample) -> tuple[bool, Finding | None]:
    """Whether the source decides the rows, and what is wrong with them."""
    info = sample.info
    expected = remake(info, sample.rows)
    if expected is None:
        return False, None
    found = reader.read_window(unfolded(info), sample.rows)
    assert expected.shape == found.shape, f"{info.name}: made {expected.shape} of {found.shape}"
    wrong = int((expected != found).sum()) if expected.dtype == found.dtype else found.size
    if wrong == 0 or expected.tobytes() == found.tobytes():
        return True, None
    where = f"row {sample.rows[0]}" if len(info.shape) > 1 else f"elements {sample.rows[0]} to {sample.rows[1] - 1}"
    what = f"not what the source gives: {wrong} of {found.size} differ in {where}"
    return True, Finding(what, info.path.name, info.name)
