"""What a conversion will do, known from headers alone: which tensor goes into which file, and how each one is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..models.dtypes import DTYPES
from ..models.errors import InputError
from .checkpoint import listed
from .meter import Meter
from .safetensors import MAX_HEADER, Header, TensorInfo, name_fault

PIECE_BYTES = 16 << 20  # output made at a time: large for a disk, small for memory
_ALIGNMENT = 4096  # of a file's data; a direct reader wants whole pages


@dataclass(frozen=True, eq=False)
class Output:
    """A tensor to be made, as a matrix of equal rows that are made some at a time.

    ``make(start, stop)`` returns the rows as an array of the dtype's carrier; it reads what it needs and may be called
    from any thread. ``unit`` is the number of rows below which making is wasteful. ``sources`` are the tensors
    of the source that it consumes; ``work_bytes`` what making one unit allocates besides its result. ``after`` outputs
    are by-products, made once the others of their file are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[int, int], NDArray]
    rows: int
    unit: int = 1
    work_bytes: int = 0
    after: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)

    @property
    def piece_rows(self) -> int:
        """Rows of one piece: whole units, `PIECE_BYTES` or one unit."""
        unit_bytes = max(1, self.unit * self.row_bytes)
        return self.unit * max(1, PIECE_BYTES // unit_bytes)

    @property
    def piece_memory(self) -> int:
        """Bytes in use while the largest piece is made."""
        rows = min(self.piece_rows, self.rows)
        return rows * self.row_bytes + -(-rows // self.unit) * self.work_bytes

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The row ranges in which the tensor is made."""
        for start in range(0, self.rows, self.piece_rows):
            yield start, min(start + self.piece_rows, self.rows)


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """One output file: its tensors in the order of their data, widest dtype first so that each is aligned."""

    name: str
    outputs: tuple[Output, ...]
    header: bytes  # with the length field in front
    offsets: Mapping[str, int]  # of each tensor in the file

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(output.nbytes for output in self.outputs)

    @property
    def header_hash(self) -> str:
        return hashlib.sha256(self.header).hexdigest()


def plan_shard(name: str, outputs: Iterable[Output], metadata: Mapping[str, str]) -> ShardPlan:
    ordered = sorted(outputs, key=lambda output: -DTYPES[output.dtype].bits)  # stable: the given order within a dtype
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for output in ordered:
        begin, end = end, end + output.nbytes
        entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise InputError(f"{len(ordered)} tensors need a header over the format's limit", name, "use smaller shards")
    header = len(text).to_bytes(8, "little") + text
    offsets = {output.name: len(header) + entries[output.name]["data_offsets"][0] for output in ordered}
    return ShardPlan(name, tuple(ordered), header, offsets)


def numbered_shards(outputs: Iterable[Output], shard_bytes: int, stem: str = "model") -> dict[str, list[Output]]:
    """Outputs in their order, filled into ``STEM-i-of-n.safetensors`` of at most ``shard_bytes`` (or one tensor)."""
    shards: list[list[Output]] = []
    room = 0
    for output in outputs:
        if not shards or output.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(output)
        room -= output.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


@dataclass(frozen=True)
class SourceFiles:
    """The source as it was planned from: what must not change while it is read, or between a run and its resumption."""

    directory: Path
    headers: Mapping[str, Header]
    config_path: Path | None

    def identity(self) -> dict[str, list[Any]]:
        """File name -> size, modification time in ns, hash of what the header (or the file, for config.json) says."""
        files = {name: _identity(header.path, _layout_hash(header)) for name, header in sorted(self.headers.items())}
        if self.config_path is not None:
            files["config.json"] = _identity(self.config_path, hashlib.sha256(self.config_path.read_bytes()))
        return files


def _identity(path: Path, digest: hashlib._Hash) -> list[Any]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, digest.hexdigest()]


def _layout_hash(header: Header) -> hashlib._Hash:
    places = [[t.name, t.dtype, t.shape, t.begin, t.end] for t in header.tensors.values()]
    return hashlib.sha256(json.dumps(places).encode())


@dataclass(frozen=True, eq=False)
class Plan:
    """A conversion: shards, then small files in their order. Checked at birth.

    ``options`` are those that decide the result. ``tensors`` are the source's; ``dropped`` maps those that are left out
    to the rule that says so. ``small_files`` maps names to contents, or to files that are copied as they are.
    ``checks`` read data and raise InputError; they run before anything is written. ``close`` closes the source.
    """

    kind: str
    options: Mapping[str, Any]
    source: SourceFiles
    meter: Meter
    shards: tuple[ShardPlan, ...]
    small_files: Mapping[str, bytes | Path]
    tensors: Mapping[str, TensorInfo]
    dropped: Mapping[str, str]
    close: Callable[[], None]
    checks: tuple[Callable[[], None], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [output.name for shard in self.shards for output in shard.outputs]
        if not names:
            raise InputError("nothing to convert", str(self.source.directory), "give a checkpoint that holds tensors")
        consumed = self._consumed()
        forgotten = [name for name in self.tensors if name not in consumed and name not in self.dropped]
        assert not forgotten, f"no rule of {self.kind} consumes or drops {listed(forgotten)}"
        assert consumed <= self.tensors.keys(), f"{self.kind} consumes what is not there"
        assert all(len(s.offsets) == len(s.outputs) for s in self.shards), "two outputs of one name in a file"
        files = [*(shard.name for shard in self.shards), *self.small_files]
        assert len(set(files)) == len(files), "two output files of one name"
        assert not any(name_fault(name) for name in (*names, *files)), "a name that is not fit for a file"

    def _consumed(self) -> set[str]:
        return {name for shard in self.shards for output in shard.outputs for name in output.sources}

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that are read, each counted once."""
        return sum(self.tensors[name].nbytes for name in self._consumed())

    @property
    def write_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_count(self) -> int:
        return sum(len(shard.outputs) for shard in self.shards)

    @property
    def piece_memory(self) -> int:
        """Bytes that one worker holds at most."""
        return max(output.piece_memory for shard in self.shards for output in shard.outputs)

    def structure_hash(self) -> str:
        """Changes whenever a byte of a header would: the planned names, dtypes, shapes and places."""
        return hashlib.sha256("".join(f"{s.name}\n{s.header_hash}\n" for s in self.shards).encode()).hexdigest()
