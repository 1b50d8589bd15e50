"""A directory against its own conversion-manifest.json: which files there are, their headers, the small files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import InputError
from ..journal import JOURNAL_FILE
from ..manifest import MANIFEST_FILE, read_manifest
from ..safetensors import Header, name_fault
from .findings import Finding


@dataclass(frozen=True)
class RecordedFile:
    size: int
    header_sha256: str
    crc32: Mapping[str, str]  # tensor -> CRC-32 in hexadecimal


@dataclass(frozen=True)
class Recorded:
    """What a manifest says. ``source_directory`` is None where none is recorded."""

    converter: int
    kind: str
    options: Mapping[str, Any]
    structure: str
    source: Mapping[str, Any]
    source_directory: Path | None
    files: Mapping[str, RecordedFile]
    small_files: Mapping[str, str]

    @property
    def checksums(self) -> dict[tuple[str, str], str]:
        """(file, tensor) -> CRC-32."""
        return {(file, name): crc for file, entry in self.files.items() for name, crc in entry.crc32.items()}


def read_recorded(directory: Path) -> Recorded | None:
    """None without a manifest. Raises InputError when it is damaged."""
    content = read_manifest(directory)
    if content is None:
        return None
    path = directory / MANIFEST_FILE
    if fault := _fault(content):
        raise InputError(f"not a manifest of a conversion: {fault}", str(path), "convert again")
    files = {
        name: RecordedFile(entry["bytes"], entry["header_sha256"], entry["crc32"])
        for name, entry in content["files"].items()
    }
    source_directory = content.get("source_directory")
    return Recorded(
        content["converter"],
        content["kind"],
        content["options"],
        content["structure"],
        content["source"],
        None if source_directory is None else Path(source_directory),
        files,
        content["small_files"],
    )


_FIELDS = {
    "converter": int, "kind": str, "options": dict, "structure": str, "source": dict, "files": dict,
    "small_files": dict,
}  # fmt: skip
_FILE_FIELDS = {"bytes": int, "header_sha256": str, "crc32": dict}


def _fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of a manifest."""
    if found := _wrong_field(content, _FIELDS):
        return found
    if not isinstance(content.get("source_directory"), (str, type(None))):
        return "source_directory is not a str"
    for name, entry in content["files"].items():
        if found := "is not a dict" if not isinstance(entry, dict) else _wrong_field(entry, _FILE_FIELDS):
            return f"{name!r}: {found}"
        if not all(isinstance(crc, str) for crc in entry["crc32"].values()):
            return f"{name!r}: a CRC-32 is not a str"
    for name in (*content["files"], *content["small_files"]):
        if fault := name_fault(name):
            return f"file name {name!r} {fault}"
    if not all(isinstance(digest, str) for digest in content["small_files"].values()):
        return "a hash of small_files is not a str"
    return None


def _wrong_field(values: Mapping[str, Any], fields: Mapping[str, type]) -> str | None:
    wrong = (key for key, kind in fields.items() if not isinstance(values.get(key), kind))
    return next((f"{key} is not a {fields[key].__name__}" for key in wrong), None)


def check_recorded(directory: Path, recorded: Recorded, headers: Mapping[str, Header]) -> Iterator[Finding]:
    """Faults that need no tensor data."""
    text = "".join(f"{name}\n{entry.header_sha256}\n" for name, entry in recorded.files.items())
    if hashlib.sha256(text.encode()).hexdigest() != recorded.structure:
        yield Finding("its files are not those that it was made for", MANIFEST_FILE)
    for name, entry in recorded.files.items():
        yield from _check_file(directory / name, entry, headers.get(name))
    for name in headers.keys() - recorded.files.keys():
        yield Finding("not a file of this conversion", name)
    for name, digest in recorded.small_files.items():
        yield from _check_small(directory / name, digest)
    if (directory / JOURNAL_FILE).exists():
        yield Finding("left by an unfinished conversion", JOURNAL_FILE)


def _check_file(path: Path, entry: RecordedFile, header: Header | None) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(f"missing, with {len(entry.crc32)} tensors", path.name)
        return
    size = path.stat().st_size
    if size != entry.size:
        yield Finding(f"{size:,} bytes, not the {entry.size:,} that were written", path.name)
    if header is None:
        return  # that it cannot be read is said by others
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.data_start)).hexdigest()
    if digest != entry.header_sha256:
        yield Finding("its header is not the one that was written", path.name)
    for name in entry.crc32.keys() - header.tensors.keys():
        yield Finding("missing", path.name, name)
    for name in header.tensors.keys() - entry.crc32.keys():
        yield Finding("not a tensor of this conversion", path.name, name)


def _check_small(path: Path, digest: str) -> Iterator[Finding]:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        yield Finding("missing", path.name)
        return
    except OSError as error:
        yield Finding(f"cannot be read: {error.strerror}", path.name)
        return
    if found != digest:
        yield Finding("not the bytes that were written", path.name)
