"""Reads around the page cache: the bytes of the usual reads, whatever the file system refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deepspan.convert.direct_reader import DirectReader
from deepspan.convert.meter import Meter, MeteredReader
from deepspan.convert.safetensors import Reader
from deepspan.models.errors import InputError

ROWS, WIDTH = 700, 4099


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Tensors that begin and end amid pages; the last one ends the file."""
    path = tmp_path_factory.mktemp("source") / "a.safetensors"
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 256, (ROWS, WIDTH), np.uint8) for name in "abc"}
    save_file(tensors | {"w": rng.integers(0, 2**16, (ROWS, WIDTH), np.uint16)}, path)
    return path


@pytest.fixture
def cold(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(reader: Reader, path: Path) -> None:
    header = reader.header(path)
    with Reader() as usual:
        for info in header.tensors.values():
            np.testing.assert_array_equal(reader.read(info), usual.read(info))
            for rows in (0, 300), (1, 700), (333, 690):
                expected = usual.read(info)[slice(*rows)]
                np.testing.assert_array_equal(reader.read_rows(info, *rows), expected)


@pytest.mark.usefixtures("cold")
def test_the_same_bytes(path):
    with DirectReader() as reader:
        check(reader, path)


def test_what_is_cached_is_read_from_the_cache(path, monkeypatch):
    path.read_bytes()
    monkeypatch.setattr(DirectReader, "_open_direct", lambda self, path: 1 // 0)
    with DirectReader() as reader:
        check(reader, path)


@pytest.mark.usefixtures("cold")
def test_a_file_system_without_direct_reads(path, monkeypatch):
    opened = os.open

    def refusing(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with DirectReader() as reader:
        check(reader, path)


@pytest.mark.parametrize("most", [0, 1, 1000, 4096, 1 << 20])
def test_short_direct_reads(path, monkeypatch, most):
    """As at the end of a file, and 0 where the disk has other alignments."""
    read = DirectReader._fill_pages
    monkeypatch.setattr(DirectReader, "_is_cached", lambda self, path, offset: False)
    monkeypatch.setattr(DirectReader, "_fill_pages", lambda self, path, data, at: read(self, path, data[:most], at))
    with DirectReader() as reader:
        check(reader, path)


def test_a_file_that_became_shorter(path, tmp_path):
    copy = tmp_path / "a.safetensors"
    copy.write_bytes(path.read_bytes())
    with DirectReader() as reader:
        info = list(reader.header(copy).tensors.values())[-1]
        os.truncate(copy, info.end - 100)
        with pytest.raises(InputError, match="shorter"):
            reader.read(info)


@pytest.mark.usefixtures("cold")
def test_what_is_read_is_counted(path):
    meter = Meter()
    with MeteredReader(meter) as reader:
        info = reader.header(path).tensors["b"]
        before = meter.read_bytes
        reader.read(info)
    assert info.nbytes <= meter.read_bytes - before < info.nbytes + 2 * 4096
    assert meter.seconds["read"] > 0
