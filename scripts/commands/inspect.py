"""``deepspan inspect``: what a checkpoint directory, or a model known by name, is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from ...convert.inspection import Inspection, inspect_directory
from ...models.catalog import load_spec
from ...models.dtypes import DTYPES
from ...models.errors import InputError
from ...models.params import (
    active_parameters,
    kv_bytes_per_token,
    mtp_parameter_count,
    stored_tensors,
    total_parameters,
)
from ...models.spec import ModelSpec

_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint directory, or the name of a model (deepseek_v3, …)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    path = Path(options.path)
    if not path.exists():
        if os.sep in options.path:
            todo = "give the directory that holds the checkpoint, or a model's name, such as deepseek_v3"
            raise InputError("no such directory", options.path, todo)
        report = {"model": options.path, **_described(load_spec(options.path))}
        print(json.dumps(report) if options.json else "\n".join(_spec_lines(report)))
        return 0
    if not path.is_dir():
        raise InputError("not a directory", str(path), "give the directory that holds the checkpoint")
    found = inspect_directory(path)
    report = _report(found)
    print(json.dumps(report, ensure_ascii=False) if options.json else "\n".join(_lines(report)))
    found.check_complete()  # end as loading would, after the report
    return 0


def _described(spec: ModelSpec) -> dict[str, Any]:
    """What follows from a spec: sizes, and the tensors of its published form."""
    tensors = [(tensor.dtype, prod(tensor.shape)) for tensor in stored_tensors(spec)]
    return {
        "spec": dataclasses.asdict(spec),
        "parameters": total_parameters(spec),
        "active_parameters": active_parameters(spec),
        "mtp_parameters": mtp_parameter_count(spec),
        "kv_bytes_per_token": kv_bytes_per_token(spec),
        "hf_tensors": _counted((dtype, size * DTYPES[dtype].bits // 8) for dtype, size in tensors),
    }


def _counted(tensors: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """(dtype, bytes) pairs summed up."""
    listed = list(tensors)
    by_dtype = Counter(dtype for dtype, _ in listed)
    return {
        "count": len(listed),
        "bytes": sum(size for _, size in listed),
        "by_dtype": dict(sorted(by_dtype.items())),
    }


def _report(found: Inspection) -> dict[str, Any]:
    return {
        "path": str(found.directory),
        "layout": found.layout,
        **(_described(found.spec) if found.spec else {"spec": None}),
        "files": len(found.headers),
        "tensors": _counted((info.dtype, info.nbytes) for info in found.tensors),
        "formats": dict(found.formats),
        "has_mtp": found.has_mtp,
        "missing": found.missing,
        "extra": found.extra,
        "faults": [str(fault) for fault in found.faults],
    }


def _lines(report: dict[str, Any]) -> Iterable[str]:
    yield f"checkpoint       {report['path']}"
    yield f"layout           {report['layout'] or 'unknown'}"
    yield f"files            {report['files']}"
    yield f"tensors          {_counts(report['tensors'])}"
    if report["formats"]:
        yield f"stored as        {', '.join(f'{count:,} {name}' for name, count in report['formats'].items())}"
    if report["spec"]:
        yield f"MTP layer        {'there' if report['has_mtp'] else 'none'}"
        yield from _spec_lines(report)
    for title in ("missing", "extra", "faults"):
        names = report[title]
        yield f"{title:<16} {len(names):,}" if names else f"{title:<16} none"
        yield from (f"    {name}" for name in names[:_LISTED])
        if len(names) > _LISTED:
            yield f"    and {len(names) - _LISTED:,} more (--json lists all)"


def _spec_lines(report: dict[str, Any]) -> Iterable[str]:
    if "model" in report:
        yield f"model            {report['model']}"
    yield f"parameters       {report['parameters']:,}, of which a token uses {report['active_parameters']:,}"
    yield f"MTP parameters   {report['mtp_parameters']:,}"
    yield f"KV cache         {report['kv_bytes_per_token']:,} bytes a token in BF16"
    yield f"published form   {_counts(report['hf_tensors'])}"
    fields = " ".join(_fields(report["spec"]))
    yield textwrap.fill(fields, 120, initial_indent="spec             ", subsequent_indent=" " * 17)


def _fields(values: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """``name=value`` words; sections are flattened to ``section.name=value``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={str(value).replace(' ', '')}"


def _counts(tensors: dict[str, Any]) -> str:
    by_dtype = ", ".join(f"{count:,} {dtype}" for dtype, count in tensors["by_dtype"].items())
    return f"{tensors['count']:,} ({by_dtype}), {tensors['bytes']:,} bytes"
