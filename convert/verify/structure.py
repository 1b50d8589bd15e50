"""The structure of a directory: files, index and headers against each other and against the parameters of the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...models.errors import InputError
from ..inspection import Inspection, inspect_directory
from ..kinds.options import Options
from ..kinds.source import source_model
from .findings import Finding
from .views import open_view


def inspect_structure(directory: Path, config: str | None) -> Inspection:
    """``config`` is a config.json, or a model's name, for a directory that has none. Raises InputError."""
    if not directory.is_dir():
        raise InputError("not a directory", str(directory), "give the directory that holds the checkpoint")
    has_own = (directory / "config.json").exists()
    spec = source_model(directory, Options(config=config)).spec if config and not has_own else None
    return inspect_directory(directory, spec)


def check_structure(found: Inspection, config: str | None) -> Iterator[Finding]:
    """Everything that headers and JSON files show to be wrong."""
    yield from (Finding.of(fault) for fault in found.faults)
    yield from (Finding("missing: no file has it", None, name) for name in found.missing)
    yield from (Finding("belongs to no parameter", _file_of(found, name), name) for name in found.extra)
    if found.layout is None:
        yield Finding("no layout of the DeepSeek-V3 family")
    elif not found.faults and not found.missing and not found.extra:
        # Shapes and dtypes, which for other layouts than Hugging Face's only reading them as canonical shows.
        try:
            open_view(found.directory, config).close()
        except InputError as fault:
            yield Finding.of(fault)


def _file_of(found: Inspection, name: str) -> str | None:
    return next((file for file, header in found.headers.items() if name in header.tensors), None)
