"""Files written around the page cache: the same bytes wherever they come from and whatever the disk takes."""

import errno
import fcntl
import os

import numpy as np
import pytest

from deepspan.convert.output_file import OutputFile
from deepspan.convert.pages import PAGE, empty_pages

MEGABYTE = 1 << 20


def values(size: int, misplaced: int = 0) -> np.ndarray:
    """Random bytes that begin ``misplaced`` bytes after the start of a page."""
    array = empty_pages((misplaced + size,), np.uint8)[misplaced:]
    array[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return array


@pytest.fixture
def file(tmp_path):
    file = OutputFile(tmp_path / "file")
    yield file
    file.close()


@pytest.fixture
def direct(monkeypatch) -> list[tuple[int, int, int]]:
    """Place, size and address of what is written directly."""
    written = []
    write = os.pwrite

    def recording(descriptor, view, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            written.append((offset, len(view), np.frombuffer(view, np.uint8).ctypes.data))
        return write(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", recording)
    return written


@pytest.mark.parametrize("size", [1, PAGE, MEGABYTE, MEGABYTE + 1, 3 * MEGABYTE - 1])
@pytest.mark.parametrize("offset", [0, 1, 512, PAGE - 512, PAGE, 5 * PAGE + 2048])
@pytest.mark.parametrize("misplaced", [0, 1, 512, 2048])
def test_every_byte_is_in_its_place(tmp_path, file, direct, size, offset, misplaced):
    data = values(size, misplaced)
    before = np.full(offset, 1, np.uint8)
    file.reserve(offset + size + 3)
    file.write(data, offset)
    file.write(before, 0)
    file.sync()
    assert (tmp_path / "file").read_bytes() == before.tobytes() + data.tobytes() + bytes(3)
    assert all(place % PAGE == length % PAGE == address % 512 == 0 for place, length, address in direct)


@pytest.mark.parametrize("offset", [0, 512])
def test_whole_pages_are_written_directly(file, direct, offset):
    file.write(values(2 * MEGABYTE + 5), offset)
    first = -offset % PAGE
    assert [entry[:2] for entry in direct] == [(offset + first, (2 * MEGABYTE + 5 - first) // PAGE * PAGE)]


def test_a_disk_with_other_alignments(tmp_path, file, monkeypatch):
    write, refused = os.pwrite, []

    def picky(descriptor, view, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    data = values(2 * MEGABYTE)
    file.write(data, 0)
    file.write(data, 2 * MEGABYTE)
    assert refused == [0]
    assert (tmp_path / "file").read_bytes() == 2 * data.tobytes()


@pytest.mark.parametrize("most", [PAGE, PAGE + 1, 1000])
def test_short_writes(tmp_path, file, monkeypatch, most):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, offset: write(descriptor, view[:most], offset))
    data = values(MEGABYTE + PAGE)
    file.write(data, 0)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_other_faults_are_errors(file, monkeypatch):
    def full(descriptor, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(values(MEGABYTE), 0)


def test_a_file_system_without_direct_writes(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    file = OutputFile(tmp_path / "other")
    data = values(MEGABYTE)
    file.write(data, 0)
    file.close()
    assert (tmp_path / "other").read_bytes() == data.tobytes()
