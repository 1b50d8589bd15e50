"""Writing one safetensors file piece by piece so that it is either whole or visibly unfinished.

The file grows under ``NAME.partial.RUN``, allocated in full at once. Its header is written last: until then the length
field is zero, which no reader accepts. Then the file is synced, renamed, and its directory synced.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..models.errors import DeepspanError
from .checksums import combined_crc32, crc32
from .output_file import OutputFile
from .plan import Output, ShardPlan

PARTIAL = ".partial."


class ShardWriter:
    """The file of one `ShardPlan`. Thread-safe; raises DeepspanError when the disk refuses."""

    def __init__(self, directory: Path, plan: ShardPlan, run: str):
        self.plan = plan
        self._directory = directory
        self._partial = directory / f"{plan.name}{PARTIAL}{run}"
        self._lock = threading.Lock()
        self._missing = sum(len(range(0, output.rows, output.piece_rows)) for output in plan.outputs)
        self._parts: dict[str, dict[int, tuple[int, int]]] = {output.name: {} for output in plan.outputs}
        try:
            self._file = OutputFile(self._partial)
        except OSError as error:
            self._fail(error, "the file")
        try:
            self._file.reserve(plan.nbytes)
        except OSError as error:
            self.abandon()
            self._fail(error, "its space")

    @property
    def is_filled(self) -> bool:
        """Whether every piece has been written."""
        return self._missing == 0

    def write(self, output: Output, start: int, rows: NDArray) -> bool:
        """Write the rows from ``start`` on; whether this was the file's last piece."""
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        expected = output.row_bytes * (min(start + output.piece_rows, output.rows) - start)
        assert len(data) == expected, f"{output.name}: made {len(data)} bytes of {expected} from row {start} on"
        offset = start * output.row_bytes
        crc = crc32(data)
        try:
            self._file.write(data, self.plan.offsets[output.name] + offset)
        except OSError as error:
            self._fail(error, f"tensor {output.name}")
        with self._lock:
            self._parts[output.name][offset] = crc, len(data)
            self._missing -= 1
            return self.is_filled

    def publish(self) -> dict[str, str]:
        """Give the file its header and its name; the CRC-32 of each tensor in hexadecimal."""
        assert self.is_filled, f"{self.plan.name} has pieces missing"
        try:
            self._file.write(np.frombuffer(self.plan.header, np.uint8), 0)
            assert self._file.read(len(self.plan.header), 0) == self.plan.header, "the header was not kept"
            self._file.sync()
            self._partial.replace(self._directory / self.plan.name)
            sync_directory(self._directory)
        except OSError as error:
            self._fail(error, "the header")
        self._file.close()
        return {name: f"{self._crc(parts):08x}" for name, parts in self._parts.items()}

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _crc(self, parts: dict[int, tuple[int, int]]) -> int:
        return combined_crc32(parts[offset] for offset in sorted(parts))

    def _fail(self, error: OSError, what: str) -> NoReturn:
        where = str(self._directory / self.plan.name)
        raise DeepspanError(
            f"writing {what} failed ({error.strerror})", where, "repair the cause and run the same command again"
        ) from error


def write_small(directory: Path, name: str, content: bytes) -> None:
    """A small file, whole or not at all."""
    partial = directory / f"{name}{PARTIAL}small"
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / name)
        sync_directory(directory)
    except OSError as error:
        where = str(directory / name)
        raise DeepspanError(
            f"writing failed ({error.strerror})", where, "repair the cause and run the same command again"
        ) from error


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
