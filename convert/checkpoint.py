"""A checkpoint directory of safetensors files: every tensor in exactly one known place, or an error that says why not.

Nothing but ``*.safetensors`` and JSON is ever opened: pickles and ``*.py`` files that come with a model stay closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..models.errors import InputError
from .safetensors import Header, Reader, TensorInfo, name_fault
from .strict_json import read_object, shorten

if TYPE_CHECKING:
    from typing_extensions import Self

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Rule name -> suffix of tensors that are no parameters: buffers that the rope settings of config.json define.
_IGNORED = {"rope-buffer": ".rotary_emb.inv_freq"}
_NAMED = 3  # how many of a list of culprits a message names


class Checkpoint:
    """An opened checkpoint: `open` validates the index and all headers, data is read on demand. Thread-safe."""

    def __init__(self, directory: Path, headers: Mapping[str, Header], reader: Reader):
        self.directory = directory
        self.headers = headers
        self._reader = reader
        tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
        self.ignored: Mapping[str, str] = MappingProxyType(
            {name: rule for name in tensors for rule, suffix in _IGNORED.items() if name.endswith(suffix)}
        )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: tensors[name] for name in sorted(tensors) if name not in self.ignored}
        )

    @classmethod
    def open(cls, directory: Path | str, reader: Reader | None = None) -> Self:
        """Read and check the index (or, without one, take every safetensors file) and all headers.

        ``headers`` maps each file's name to its header; ``ignored`` maps tensors that are no parameters to the rule
        that says so. ``reader`` reads the data; the checkpoint closes it. Raises InputError.
        """
        directory = Path(directory)
        files = _list(directory)
        index = _find_index(directory, files)
        weight_map = None if index is None else _read_index(index)
        shards = sorted(set(weight_map.values())) if weight_map else [f for f in files if f.endswith(".safetensors")]
        _check_files(directory, files, shards, index)
        reader = reader or Reader()
        try:
            headers = {shard: reader.header(path_inside(directory, shard)) for shard in shards}
            places = _places(headers)
            if index is not None and weight_map is not None:
                _check_index(index, weight_map, places)
        except BaseException:
            reader.close()
            raise
        return cls(directory, MappingProxyType(headers), reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json; InputError when there is none or it is not a JSON object."""
        path = self.directory / "config.json"
        if not path.is_file():
            raise InputError("no config.json", str(self.directory), "copy it from the model that the weights belong to")
        return MappingProxyType(read_object(path))

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data, ignored tensors left out."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> NDArray:
        """The stored tensor, or a (start, stop) window of it, as its dtype's carrier array (see `models.dtypes`)."""
        return self._reader.read_window(self.tensors[name], rows, cols)


def listed(names: Sequence[str]) -> str:
    """The first names and how many more there are, for a message."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _list(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except NotADirectoryError as error:
        raise InputError("not a directory", str(directory), "give the directory that holds the checkpoint") from error
    except OSError as error:
        raise InputError("cannot open the checkpoint", str(directory), error.strerror or str(error)) from error


def _find_index(directory: Path, files: list[str]) -> Path | None:
    indexes = [name for name in files if name.endswith(".safetensors.index.json")]
    if len(indexes) > 1:
        raise InputError(f"{len(indexes)} index files: {listed(indexes)}", str(directory), "keep the one that applies")
    return directory / indexes[0] if indexes else None


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("index without a weight_map", str(path), "download the index again")
    for tensor, shard in weight_map.items():
        if fault := name_fault(tensor):
            raise InputError(f"tensor name {shorten(tensor)} {fault}", str(path), "download the index again")
        if not isinstance(shard, str) or name_fault(shard) or not shard.endswith(".safetensors"):
            what = f"{shorten(str(shard))}, the place of {shorten(tensor)}, is not a plain .safetensors file name"
            raise InputError(what, str(path), "download the index again")
    return weight_map


def _check_files(directory: Path, files: list[str], shards: list[str], index: Path | None) -> None:
    where = str(directory)
    if partial := [name for name in files if ".partial" in name]:
        raise InputError(f"unfinished files: {listed(partial)}", where, "finish or repeat what was writing them")
    if not shards:
        if pickles := [name for name in files if name.endswith(_PICKLES)]:
            what = f"only pickled weights ({listed(pickles)}), which can run code when they are read"
            raise InputError(what, where, "get a safetensors version of the model, or convert it where it was made")
        raise InputError("no safetensors files", where, "give the directory that holds the checkpoint")
    if absent := [name for name in shards if name not in files]:
        raise InputError(f"files of the index are absent: {listed(absent)}", where, "download them")
    if extra := [name for name in files if name.endswith(".safetensors") and name not in shards]:
        assert index is not None, "without an index every file counts"
        raise InputError(f"not in {index.name}: {listed(extra)}", where, "move them away, or correct the index")


def path_inside(directory: Path, name: str) -> Path:
    """The file itself, or where its link leads, which must be inside the directory.

    The Hugging Face cache is the one exception: there ``snapshots/REVISION/NAME`` links to ``../../blobs/HASH``.
    """
    path = directory / name
    try:
        home, target = directory.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError("link to nowhere", str(path), "download the file again") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise InputError("link to outside of the checkpoint", str(path), "give the directory that holds the files")
    return path


def _places(headers: Mapping[str, Header]) -> dict[str, str]:
    places: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in places:
                raise InputError(f"tensor {name} is there twice", f"{places[name]} and {shard}", "remove one of them")
            places[name] = shard
    return places


def _check_index(index: Path, weight_map: Mapping[str, str], places: Mapping[str, str]) -> None:
    todo = "download the index and the files again, from one revision"
    if absent := sorted(weight_map.keys() - places.keys()):
        raise InputError(f"tensors of the index are in no file: {listed(absent)}", str(index), todo)
    if unlisted := sorted(places.keys() - weight_map.keys()):
        raise InputError(f"tensors are not in the index: {listed(unlisted)}", str(index), todo)
    moved = [name for name, shard in weight_map.items() if places[name] != shard]
    if moved:
        what = f"tensor {moved[0]} is in {places[moved[0]]}, not in {weight_map[moved[0]]} as the index says"
        raise InputError(what, str(index), todo)
