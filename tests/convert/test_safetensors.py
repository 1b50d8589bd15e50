"""The strict reader: refuses what two parsers could read differently, and reads the rest as the library does."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspan.convert.safetensors import MAX_NAME, Reader, read_header
from deepspan.models.dtypes import DTYPES
from deepspan.models.errors import InputError

ONE_BYTE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def framed(header: str | bytes, data: bytes = b"\0") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def one(dtype: str = "U8", shape: str = "[1]", offsets: str = "[0,1]", extra: str = "") -> str:
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{extra}}}}}'


def two(first: tuple[int, int], second: tuple[int, int]) -> str:
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return json.dumps(entries)


HOSTILE: dict[str, tuple[bytes, str]] = {
    # Refused by the safetensors library as well.
    "empty file": (b"", "truncated: 0 bytes, not even a header length"),
    "seven bytes": (b"\1" * 7, "truncated: 7 bytes, not even a header length"),
    "header length of zero": (bytes(100), "unfinished file: its header was never written"),
    "header length of 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", "header length 9223372036854775808 is over"),
    "header length over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "header length 100000001 is over"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated: 98 bytes of the header"),
    "trailing bytes": (framed(one(), b"\0PK"), "2 bytes after the last tensor"),
    "trailing NULs": (framed(one(), bytes(9)), "8 bytes after the last tensor"),
    "truncated data": (framed(one(shape="[8]", offsets="[0,8]"), bytes(3)), "truncated: 5 of "),
    "overlap": (framed(two((0, 4), (2, 6)), bytes(6)), "tensors 'a' and 'b' overlap"),
    "one range for two tensors": (framed(two((0, 4), (0, 4)), bytes(4)), "tensors 'a' and 'b' overlap"),
    "hole at the start": (framed(one(offsets="[1,2]"), bytes(2)), "a hole of 1 bytes before tensor 'a'"),
    "hole in the middle": (framed(two((0, 2), (3, 4)), bytes(4)), "a hole between tensors 'a' and 'b'"),
    "shape and dtype need more": (framed(one(shape="[2]")), "tensor 'a' of U8 [2] needs 2 bytes and has 1"),
    "half a byte": (framed(one(dtype="F4", shape="[3]")), "tensor 'a' of F4 [3] needs 1.5 bytes and has 1"),
    "product that overflows": (framed(one("I8", f"[{2**33},{2**33}]")), "tensor 'a' has an impossible shape"),
    "dimension of 2^64": (framed(one(shape=f"[{2**64}]")), "an integer that parsers read differently"),
    "negative dimension": (framed(one(shape="[-1]")), "tensor 'a' has an impossible shape"),
    "dimension of minus zero": (framed(one(shape="[-0]")), "an integer that parsers read differently"),
    "fractional dimension": (framed(one(shape="[1.0]")), "a fraction: '1.0'"),
    "exponent": (framed(one(shape="[1e0]")), "a fraction: '1e0'"),
    "boolean dimension": (framed(one(shape="[true]")), "tensor 'a' has an impossible shape"),
    "text for a shape": (framed(one(shape='"1"')), "tensor 'a' has an impossible shape"),
    "no shape": (framed('{"a":{"dtype":"U8","data_offsets":[0,1]}}'), "tensor 'a' has other fields than"),
    "three offsets": (framed(one(offsets="[0,1,1]")), "tensor 'a' has impossible data_offsets"),
    "reversed range": (framed(one(offsets="[1,0]")), "tensor 'a' has impossible data_offsets"),
    "negative offset": (framed(one(offsets="[-1,0]")), "tensor 'a' has impossible data_offsets"),
    "unknown dtype": (framed(one(dtype="F9")), "tensor 'a' has the unknown dtype 'F9'"),
    "number for a dtype": (framed('{"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}}'), "the unknown dtype '8'"),
    "entry that is a list": (framed('{"a":[]}'), "tensor 'a' has other fields than"),
    "header that is a list": (framed("[]"), "header does not start with '{'"),
    "header cut off": (framed(one()[:-1]), "header: not JSON (Expecting"),
    "nothing but an opening brace": (framed("{" + " " * 9), "header does not end with '}' and spaces"),
    "byte order mark": (framed("\ufeff" + one()), "header does not start with '{'"),
    "NUL after the header": (framed(one() + "\0"), "header does not end with '}' and spaces"),
    "not UTF-8": (framed(one().encode().replace(b'"a"', b'"\xff"')), "header: not UTF-8"),
    "lone surrogate in a name": (framed(one().replace('"a"', r'"\ud800"')), "half of a surrogate pair"),
    "lone surrogate in metadata": (framed(r'{"__metadata__":{"k":"\ud800"}}', b""), "half of a surrogate pair"),
    "NaN": (framed(one(shape="[NaN]")), "a constant that is not JSON: 'NaN'"),
    "two __metadata__": (framed('{"__metadata__":{},"__metadata__":{}}', b""), "key '__metadata__' is there twice"),
    "metadata with a number": (framed('{"__metadata__":{"k":1}}', b""), "__metadata__ is not a map of strings"),
    "metadata that is null": (framed('{"__metadata__":null}', b""), "__metadata__ is not a map of strings"),
    "deep nesting": (framed('{"a":' + "[" * 99_999 + "]" * 99_999 + "}", b""), "header: nested too deeply"),
    # Accepted by the safetensors library 0.8.0 (or by some of its readers), and refused here.
    "name twice, same range": (
        framed(one()[:-1] + ',"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'),
        "key 'a' is there twice",
    ),
    "space before the header": (framed(" " + one()), "header does not start with '{'"),
    "newline after the header": (framed(one() + "\n"), "header does not end with '}' and spaces"),
    "tab after the header": (framed(one() + " \t"), "header does not end with '}' and spaces"),
    "empty name": (framed(f'{{"":{ONE_BYTE}}}'), "tensor name '' is empty"),
    "NUL in a name": (framed(rf'{{"a\u0000":{ONE_BYTE}}}'), r"tensor name 'a\x00' has characters that are"),
    "line break in a name": (framed(rf'{{"a\nb":{ONE_BYTE}}}'), r"tensor name 'a\nb' has characters that are"),
    "terminal escape in a name": (framed(rf'{{"\u001b[2J":{ONE_BYTE}}}'), r"tensor name '\x1b[2J' has characters"),
    "right-to-left override": (framed(f'{{"a\u202eb":{ONE_BYTE}}}'), r"tensor name 'a\u202eb' has characters"),
    "relative path": (framed(f'{{"../../x":{ONE_BYTE}}}'), "tensor name '../../x' looks like a path"),
    "absolute path": (framed(f'{{"/etc/x":{ONE_BYTE}}}'), "tensor name '/etc/x' looks like a path"),
    "backslash path": (framed(rf'{{"a\\b":{ONE_BYTE}}}'), "looks like a path"),
    "dots only": (framed(f'{{"..":{ONE_BYTE}}}'), "tensor name '..' looks like a path"),
    "huge name": (framed(f'{{"{"n" * (MAX_NAME + 1)}":{ONE_BYTE}}}'), f"is longer than {MAX_NAME} characters"),
    "a million empty tensors": (
        framed("{" + ",".join(f'"{i:x}":{EMPTY}' for i in range(1_000_000)) + "}", b""),
        "header of more than 500000 tensors",
    ),
    "rank 200,001": (framed(one(shape="[" + "1," * 200_000 + "1]")), "tensor 'a' has an impossible shape"),
    "huge dimension of an empty tensor": (
        framed(one(shape=f"[0,{2**62}]", offsets="[0,0]"), b""),
        "tensor 'a' has an impossible shape",
    ),
    "huge product beside a zero": (
        framed(one(shape=f"[{2**39},{2**39},0]", offsets="[0,0]"), b""),
        "tensor 'a' has an impossible shape",
    ),
    "unknown field": (framed(one(extra=',"stride":[1]')), "tensor 'a' has other fields than"),
    # What is at the place of a safetensors file in practice.
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4302\n",
        "a git-lfs pointer, not the weights",
    ),
    "short git-lfs pointer": (b"version https://git-lfs", "a git-lfs pointer, not the weights"),
    "torch's zip": (b"PK\3\4" + bytes(60), "a zip archive or a pickle, not safetensors"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(60), "a pickle, not safetensors"),
    "newer pickle": (b"\x80\x04\x95\x10" + bytes(60), "a pickle, not safetensors"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(60), "a web page, not safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_and_named(case: str, tmp_path: Path) -> None:
    raw, what = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert what in caught.value.what
    assert str(path) in message and "\n" not in message and message.isprintable()
    assert len(message) < len(str(path)) + 400


def test_refusing_a_million_tensors_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE["a million empty tensors"][0])
    size = path.stat().st_size
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 500000 tensors"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * size


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, "cannot open"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot open"),
    ],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(InputError, match=f"^{what}: {path}: "):
        read_header(path)


@pytest.mark.parametrize("length", [0x280, 0x10280, 0x480])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed(one().ljust(length)))
    assert list(read_header(path).tensors) == ["a"]


def test_a_file_that_shrinks_or_goes_away_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.arange(4096)}, path)
    with Reader() as reader:
        info = reader.header(path).tensors["a"]
        os.truncate(path, 4096)
        with pytest.raises(InputError, match="the file became shorter while it was read"):
            reader.read(info)


def test_sub_byte_tensors_are_listed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed(one(dtype="F6_E2M3", shape="[4]", offsets="[0,3]"), bytes(3)))
    with Reader() as reader:
        info = reader.header(path).tensors["a"]
        assert (info.dtype, info.shape, info.nbytes) == ("F6_E2M3", (4,), 3)
        with pytest.raises(InputError, match="F6_E2M3 data of tensor a"):
            reader.read(info)


def test_misaligned_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = np.array([1.5, -2.25], np.float32)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path.write_bytes(framed(json.dumps(header), b"\7" + values.tobytes()))
    with Reader() as reader:
        np.testing.assert_array_equal(reader.read(reader.header(path).tensors["b"]), values)


# Against the safetensors library -------------------------------------------------------------------------------------

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: name.isprintable() and name.strip(".") and name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
FUZZ = settings(
    max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(TORCH_DTYPES)), draw(SHAPES)
    size = int(np.prod(shape, dtype=int))
    if dtype == torch.bool:
        raw = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        return torch.tensor(raw, dtype=dtype).reshape(shape)
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return torch.frombuffer(bytearray(raw or bytes(8)), dtype=torch.uint8)[: len(raw)].view(dtype).reshape(shape)


VALID = st.dictionaries(NAMES, tensors(), max_size=5)
# Not the empty map: without tensors the library then writes a header that is not JSON.
METADATA = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3)


@FUZZ
@given(values=VALID, metadata=METADATA)
def test_what_the_library_writes_is_read_back(values: dict[str, torch.Tensor], metadata, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(values, metadata))
    with Reader() as reader:
        header = reader.header(path)
        assert dict(header.metadata) == (metadata or {})
        assert header.tensors.keys() == values.keys()
        for name, value in values.items():
            info = header.tensors[name]
            read = reader.read(info)
            assert read.shape == tuple(value.shape) == info.shape
            assert read.dtype == DTYPES[info.dtype].carrier
            assert read.tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def library_reads(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(raw)
    }


def same_as_library_or_refused(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    with Reader() as reader:
        try:
            header = reader.header(path)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            return
        library = library_reads(raw)  # raises when it refuses what the strict reader takes
        assert header.tensors.keys() == library.keys()
        for name, (dtype, shape, data) in library.items():
            info = header.tensors[name]
            assert (info.dtype, info.shape) == (dtype, shape)
            if DTYPES[dtype].carrier is not None:
                assert reader.read(info).tobytes() == data


TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"1", b"9", b"-", b".", b"e", b" ", b"\n", b"\0", b"\\u",
          b"\\", b"d800", b"F8_E4M3", b"BF16", b"F4", b"__metadata__", b"null", b"true", b"NaN", b"\xff",
          b"\xef\xbb\xbf", b"18446744073709551616", b"549755813888,"]  # fmt: skip


@FUZZ
@given(values=VALID, data=st.data())
def test_mutated_headers_are_refused_or_mean_the_same(values: dict[str, torch.Tensor], data, tmp_path: Path) -> None:
    raw = safetensors.torch.save(values, {"format": "pt"})
    length = int.from_bytes(raw[:8], "little")
    header, body = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header)))
        kind = data.draw(st.sampled_from(["insert", "delete", "replace", "repeat"]))
        end = min(len(header), at + data.draw(st.integers(1, 12)))
        if kind == "insert":
            header[at:at] = data.draw(st.sampled_from(TOKENS))
        elif kind == "delete":
            del header[at:end]
        elif kind == "replace":
            header[at:end] = data.draw(st.sampled_from(TOKENS))
        else:
            header[end:end] = header[at:end]
    same_as_library_or_refused(framed(bytes(header), body), tmp_path / "model.safetensors")


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F9", "bf16"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**32, 2**39, 2**40]), max_size=3),
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2),
    }
)


@FUZZ
@given(entries=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRIES, max_size=3), size=st.integers(0, 24))
def test_invented_headers_are_refused_or_mean_the_same(entries, size: int, tmp_path: Path) -> None:
    same_as_library_or_refused(framed(json.dumps(entries), bytes(range(size))), tmp_path / "model.safetensors")


@FUZZ
@given(values=VALID, data=st.data())
def test_damaged_files_are_refused_or_mean_the_same(values: dict[str, torch.Tensor], data, tmp_path: Path) -> None:
    raw = bytearray(safetensors.torch.save(values))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    same_as_library_or_refused(bytes(raw), tmp_path / "model.safetensors")


# Windows -------------------------------------------------------------------------------------------------------------


def ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


@FUZZ
@given(data=st.data())
def test_windows_equal_slices(data: st.DataObject, tmp_path: Path) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    values = np.random.default_rng(1).integers(0, 1 << 16, shape).astype(np.uint16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.from_numpy(values)}))
    with Reader() as reader:
        info = reader.header(path).tensors["a"]
        axis = data.draw(st.integers(0, len(shape) - 1))
        start, stop = data.draw(ranges(shape[axis]))
        expected = np.take(values, range(start, stop), axis)
        np.testing.assert_array_equal(reader.read_slice(info, axis, start, stop), expected)
        rows, cols = data.draw(st.none() | ranges(shape[0])), data.draw(st.none() | ranges(shape[1]))
        window = reader.read_window(info, rows, cols)
        np.testing.assert_array_equal(window, values[slice(*rows or (None,)), slice(*cols or (None,))])


@pytest.mark.parametrize("width", [64, 3000, 70_000])
def test_wide_and_narrow_columns(width: int, tmp_path: Path) -> None:
    """A slice of less than a page a row is taken from whole rows in strips; a wider one is read by itself."""
    values = np.random.default_rng(2).integers(0, 255, (300, 100_000), np.uint8)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.from_numpy(values)}, path)
    with Reader() as reader:
        info = reader.header(path).tensors["a"]
        np.testing.assert_array_equal(reader.read_slice(info, 1, 777, 777 + width), values[:, 777 : 777 + width])
        np.testing.assert_array_equal(reader.read_rows(info, 10, 20), values[10:20])


def test_a_window_of_whole_rows_is_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = np.arange(300 * 4096, dtype=np.float32).reshape(300, 4096)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": values}, path)
    with Reader() as reader:
        info = reader.header(path).tensors["a"]
        reads = []

        def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            reads.append(offset)
            return preadv(descriptor, buffers, offset)

        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", counted)
        np.testing.assert_array_equal(reader.read_window(info, (7, 290), (0, 4096)), values[7:290])
    assert len(reads) == 1
