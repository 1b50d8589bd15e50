"""One pass over all data: every tensor's checksum, and values that no sound checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from ...models.dtypes import DTYPES
from ...models.errors import InputError
from ..checksums import combined_crc32, crc32
from ..safetensors import Header, Reader, TensorInfo
from .degenerate import Values, values_of
from .findings import Finding, in_parallel

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class _Seen:
    """A piece of a tensor, after it was read; ``crc`` is None when it could not be."""

    info: TensorInfo
    crc: tuple[int, int] | None
    values: Values
    fault: InputError | None = None


def check_contents(
    headers: Mapping[str, Header],
    checksums: Mapping[tuple[str, str], str],
    reader: Reader,
    workers: int,
    report: Callable[[int], None],
) -> Iterator[Finding]:
    """Faults of every tensor. ``checksums`` maps (file, tensor) to the CRC-32 that was recorded; ``report`` gets bytes.

    Memory is bounded by a few pieces a worker.
    """
    pieces = (piece for header in headers.values() for info in header.tensors.values() for piece in _pieces(info))
    done = 0
    for _, group in groupby(in_parallel(partial(_look, reader), pieces, workers), key=lambda seen: seen.info):
        seen = list(group)
        info = seen[0].info
        done += info.nbytes
        report(done)
        faults = [piece.fault for piece in seen if piece.fault]
        if faults:
            yield Finding(faults[0].what, info.path.name, info.name)
            continue
        recorded = checksums.get((info.path.name, info.name))
        found = f"{combined_crc32(piece.crc for piece in seen if piece.crc):08x}"
        if recorded is not None and recorded != found:
            yield Finding(f"not the bytes that were written: CRC-32 {found}, not {recorded}", info.path.name, info.name)
        for what in sum((piece.values for piece in seen), Values()).faults(info.name):
            yield Finding(what, info.path.name, info.name)


def _pieces(info: TensorInfo) -> Iterable[tuple[TensorInfo, int, int]]:
    """Byte ranges of a tensor, one at least."""
    for begin in range(info.begin, info.end, _PIECE_BYTES):
        yield info, begin, min(begin + _PIECE_BYTES, info.end)
    if info.begin == info.end:
        yield info, info.begin, info.end


def _look(reader: Reader, piece: tuple[TensorInfo, int, int]) -> _Seen:
    info, begin, end = piece
    if begin == end:
        return _Seen(info, (0, 0), Values(has_nonzero=True))  # no elements
    try:
        raw = reader.read(replace(info, dtype="U8", shape=(end - begin,), begin=begin, end=end))
    except InputError as fault:
        return _Seen(info, None, Values(), fault)
    crc = crc32(raw), len(raw)
    carrier = DTYPES[info.dtype].carrier
    values = values_of(info.name, info.dtype, raw if carrier is None else raw.view(carrier))
    return _Seen(info, crc, values)
