"""A strict safetensors reader: headers that two parsers could read differently are refused, data is read on demand.

Stricter than the reference implementation, which accepts duplicate names, leading whitespace, unknown fields, names
that are paths, a million empty tensors and shapes of rank 200,000. Data is read with pread into ordinary arrays, never
mapped: a page fault on a mapped file that has gone away kills the process, a failed read is an error. Copying also
makes misaligned tensors harmless. Source: the format description of huggingface/safetensors.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import DTYPES
from ..models.errors import InputError
from .pages import empty_pages
from .strict_json import StrictJsonError, parse_object, shorten

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_TENSORS = 500_000  # a file; the whole of Kimi-K2 in INT4 has 280,000
MAX_RANK = 8
MAX_DIMENSION = 1 << 40
MAX_ELEMENTS = 1 << 56  # their bits can be counted in 64
MAX_NAME = 512  # characters
_MAX_COMMAS = 16 * MAX_TENSORS  # bounds what parsing may allocate, before it starts
_PAGE = 4096
_STRIP = 8 << 20  # bytes

_DOWNLOAD = "download the file again"
_STARTS = {
    b"version https://git-lfs": ("a git-lfs pointer, not the weights", "run git lfs pull"),
    b"PK\x03\x04": ("a zip archive or a pickle, not safetensors", "convert it to safetensors where it was made"),
    **{
        bytes((0x80, protocol)): ("a pickle, not safetensors", "convert it to safetensors where it was made")
        for protocol in range(2, 6)
    },
    b"<!DOCTYPE": ("a web page, not safetensors", "download the file itself, logged in if the model is gated"),
    b"<html": ("a web page, not safetensors", "download the file itself, logged in if the model is gated"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are: ``begin`` and ``end`` are offsets into the file ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A validated header; ``tensors`` are in the order of their data."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


class Reader:
    """Reads headers and tensors of safetensors files; keeps the files open. Safe to use from several threads.

    Every method raises InputError when a file is not what it should be.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def header(self, path: Path) -> Header:
        """The validated header of ``path``. No tensor data is read."""
        descriptor = self._open(path)
        size = os.fstat(descriptor).st_size
        length = _header_length(path, self._bytes(path, 0, min(size, 32)), size)
        return _parse_header(path, self._bytes(path, 8, length), size)

    def read(self, info: TensorInfo, out: NDArray | None = None) -> NDArray:
        """The whole tensor as an array of its dtype's carrier, in ``out`` if given (contiguous, of the same size)."""
        if out is None:
            return self._take(info.path, info.begin, info.nbytes).view(_carrier(info)).reshape(info.shape)
        self._fill(info.path, out.reshape(-1).view(np.uint8), info.begin)
        return out

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> NDArray:
        """``tensor[start:stop]``; only those bytes are read."""
        return self.read_window(info, (start, stop))

    def read_slice(self, info: TensorInfo, axis: int, start: int, stop: int) -> NDArray:
        """``tensor[..., start:stop, ...]`` along ``axis``, reading little more than the slice."""
        assert 0 <= start <= stop <= info.shape[axis], f"{info.name}: {start}:{stop} of axis {axis} of {info.shape}"
        shape = (*info.shape[:axis], stop - start, *info.shape[axis + 1 :])
        out = np.empty(shape, _carrier(info))
        if out.size == 0:
            return out
        inner = prod(info.shape[axis + 1 :]) * out.itemsize
        outer = prod(info.shape[:axis])
        rows = out.reshape(outer, -1).view(np.uint8)
        stride, skip = info.shape[axis] * inner, start * inner
        if outer == 1 or rows.shape[1] >= _PAGE:
            for row in range(outer):
                self._fill(info.path, rows[row], info.begin + row * stride + skip)
        else:
            # Less than a page of each row is wanted, and a disk reads whole pages: take whole rows, in strips.
            self._columns(info, rows, stride, skip)
        return out

    def read_window(
        self, info: TensorInfo, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> NDArray:
        """``tensor[rows, cols]`` of (start, stop) ranges; a range left out is everything."""
        if rows is not None:
            assert 0 <= rows[0] <= rows[1] <= info.shape[0], f"{info.name}: rows {rows} of {info.shape}"
            row_bytes = info.nbytes // max(1, info.shape[0])
            begin, end = (info.begin + row * row_bytes for row in rows)
            info = replace(info, shape=(rows[1] - rows[0], *info.shape[1:]), begin=begin, end=end)
        if cols is None or cols == (0, info.shape[1]):  # one stretch of the file
            return self.read(info)
        return self.read_slice(info, 1, *cols)

    def _columns(self, info: TensorInfo, rows: NDArray[np.uint8], stride: int, skip: int) -> None:
        step = max(1, _STRIP // stride)
        buffer = np.empty((min(step, len(rows)), stride), np.uint8)
        for start in range(0, len(rows), step):
            strip = buffer[: min(step, len(rows) - start)]
            self._fill(info.path, strip.reshape(-1), info.begin + start * stride)
            rows[start : start + len(strip)] = strip[:, skip : skip + rows.shape[1]]

    def _take(self, path: Path, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the file in new memory."""
        buffer = empty_pages((size,), np.uint8)
        self._fill(path, buffer, offset)
        return buffer

    def _bytes(self, path: Path, offset: int, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        self._fill(path, buffer, offset)
        return buffer.tobytes()

    def _fill(self, path: Path, buffer: NDArray[np.uint8], offset: int) -> None:
        descriptor, view = self._open(path), buffer.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"reading failed at byte {offset + done}", str(path), str(error.strerror)) from error
            if count == 0:
                raise InputError("the file became shorter while it was read", str(path), _DOWNLOAD)
            done += count

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = _open_file(path)
            return self._files[path]


def read_header(path: Path) -> Header:
    """The validated header of one file; see `Reader` for reading data too."""
    with Reader() as reader:
        return reader.header(path)


def _open_file(path: Path) -> int:
    try:
        # O_NONBLOCK: a named pipe would otherwise wait for a writer that never comes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError("cannot open", str(path), error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("not a regular file", str(path), "give a safetensors file")
    return descriptor


def _carrier(info: TensorInfo) -> np.dtype:
    carrier = DTYPES[info.dtype].carrier
    if carrier is None:
        raise InputError(f"{info.dtype} data of tensor {info.name}", str(info.path), "use a format of 8 bits or more")
    return carrier


def _header_length(path: Path, start: bytes, size: int) -> int:
    """Length of the JSON header, from the first bytes of a file of ``size`` bytes."""
    for magic, (what, todo) in _STARTS.items():
        # A header of 640 bytes starts like a pickle: what goes on like a header is one.
        if start.startswith(magic) and start[8:9] != b"{":
            raise InputError(what, str(path), todo)
    if size < 8:
        raise InputError(f"truncated: {size} bytes, not even a header length", str(path), _DOWNLOAD)
    length = int.from_bytes(start[:8], "little")
    if length == 0:
        raise InputError(
            "unfinished file: its header was never written", str(path), "finish what writes it, or redo it"
        )
    if length > MAX_HEADER:
        raise InputError(f"header length {length} is over the format's limit", str(path), "give a safetensors file")
    if length > size - 8:
        raise InputError(f"truncated: {8 + length - size} bytes of the header are missing", str(path), _DOWNLOAD)
    return length


def _parse_header(path: Path, raw: bytes, size: int) -> Header:
    def fail(what: str) -> NoReturn:
        raise InputError(what, str(path), "replace the file with one from a correct writer")

    if not raw.startswith(b"{"):
        fail("header does not start with '{'")
    if not raw.rstrip(b" ").endswith(b"}"):
        fail("header does not end with '}' and spaces")
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > _MAX_COMMAS:
        fail(f"header of more than {MAX_TENSORS} tensors")
    try:
        entries = parse_object(raw, floats=False)
        metadata = _metadata(entries.pop("__metadata__", {}))
        data_start = 8 + len(raw)
        infos = [_tensor(name, entry, path, data_start) for name, entry in entries.items()]
        infos.sort(key=lambda info: (info.begin, info.end))
        _check_contiguous(infos, data_start)
    except StrictJsonError as error:
        fail(f"header: {error}")
    _check_size(path, max((info.end for info in infos), default=data_start), size)
    return Header(path, MappingProxyType({info.name: info for info in infos}), metadata, data_start, size)


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise StrictJsonError("__metadata__ is not a map of strings to strings")
    return MappingProxyType(value)


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if fault := name_fault(name):
        raise StrictJsonError(f"tensor name {shorten(name)} {fault}")
    where = f"tensor {shorten(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise StrictJsonError(f"{where} has other fields than dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise StrictJsonError(f"{where} has the unknown dtype {shorten(str(entry['dtype']))}")
    shape = _integers(entry["shape"], MAX_RANK, MAX_DIMENSION)
    # Zeros are left out of the product: a reader that multiplies from the left overflows before it meets one.
    if shape is None or prod(filter(None, shape)) > MAX_ELEMENTS:
        raise StrictJsonError(f"{where} has an impossible shape")
    offsets = _integers(entry["data_offsets"], 2, 1 << 62)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise StrictJsonError(f"{where} has impossible data_offsets")
    bits = prod(shape) * dtype.bits
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        size = offsets[1] - offsets[0]
        raise StrictJsonError(f"{where} of {dtype.name} {list(shape)} needs {bits / 8:g} bytes and has {size}")
    return TensorInfo(name, dtype.name, shape, path, data_start + offsets[0], data_start + offsets[1])


def name_fault(name: str) -> str | None:
    """Why ``name`` must not be a tensor's; names become file names and terminal output."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    if not name.isprintable():
        return "has characters that are not printable"
    if "/" in name or "\\" in name or name.strip(".") == "":
        return "looks like a path"
    return None


def _integers(value: Any, most: int, below: int) -> tuple[int, ...] | None:
    """``value`` as a tuple of at most ``most`` integers of 0..below-1, or None."""
    if not isinstance(value, list) or len(value) > most:
        return None
    if not all(type(item) is int and 0 <= item < below for item in value):
        return None
    return tuple(value)


def _check_contiguous(infos: list[TensorInfo], data_start: int) -> None:
    if infos and infos[0].begin != data_start:
        raise StrictJsonError(f"a hole of {infos[0].begin - data_start} bytes before tensor {shorten(infos[0].name)}")
    for before, after in pairwise(infos):
        if after.begin < before.end:
            raise StrictJsonError(f"tensors {shorten(before.name)} and {shorten(after.name)} overlap")
        if after.begin > before.end:
            raise StrictJsonError(f"a hole between tensors {shorten(before.name)} and {shorten(after.name)}")


def _check_size(path: Path, end: int, size: int) -> None:
    if size < end:
        raise InputError(f"truncated: {end - size} of {end} bytes are missing", str(path), _DOWNLOAD)
    if size > end:
        raise InputError(f"{size - end} bytes after the last tensor", str(path), _DOWNLOAD)
