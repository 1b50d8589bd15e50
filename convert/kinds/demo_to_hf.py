"""``demo-to-hf``: the rank files of DeepSeek's own demo merged into a Hugging Face directory, tensors as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.layouts.deepseek_demo import DemoTensor, demo_tensor, rank_file
from ...models.params import Param, parameters
from ...models.quant import block_grid
from ...models.spec import ModelSpec
from ..allowances import Allowances
from ..checkpoint import listed
from ..declarations import fp8_config
from ..meter import Meter, MeteredReader
from ..plan import Output, Plan, SourceFiles
from ..quant_config import QuantConfig
from ..safetensors import Header, Reader, TensorInfo
from .huggingface import companions, index_files, new_shards
from .options import Options
from .source import source_model

Shape = tuple[int, ...]
_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_DTYPES = ("BF16", "F16", "F32", "F8_E4M3")
_SCALES = ("F32", "BF16", "F8_E8M0")


@dataclass(frozen=True, eq=False)
class _Ranks:
    """The opened rank files, in order."""

    directory: Path
    spec: ModelSpec
    block: tuple[int, int]
    headers: tuple[Header, ...]
    reader: MeteredReader

    def find(self, canonical: str) -> tuple[DemoTensor, list[TensorInfo]] | None:
        """Where a stored tensor lies: its place and its parts by rank; None when no rank has it."""
        place = demo_tensor(self.spec, canonical, len(self.headers))
        owners = self.headers if place.only_rank is None else (self.headers[place.only_rank],)
        parts = [header.tensors[place.name] for header in owners if place.name in header.tensors]
        if parts and len(parts) < len(owners):
            lacking = next(header.path for header in owners if place.name not in header.tensors)
            raise InputError(f"missing: {place.name}", str(lacking), "get the complete set of rank files")
        return (place, parts) if parts else None


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    model = source_model(directory, options)
    spec, config = model.spec, model.config or {}
    meter = Meter()
    reader = MeteredReader(meter)
    try:
        headers = open_ranks(directory, reader)
        block = QuantConfig(config.get("quantization_config") or {}, str(model.path)).block
        ranks = _Ranks(directory, spec, block, headers, reader)
        outputs, dropped = _outputs(ranks, options)
        dropped |= _extra(ranks, {source for output in outputs for source in output.sources} | dropped.keys(), allows)
        allows.check_used()
        shards = new_shards(outputs, options.shard_bytes)
        has_mtp = any(param.layer in spec.mtp_layers() for param in _present(ranks)) and not options.drop_mtp
        return Plan(
            kind="demo-to-hf",
            options={**options.chosen(), **model.named},
            source=SourceFiles(directory, {header.path.name: header for header in headers}, model.path),
            meter=meter,
            shards=shards,
            small_files={
                **index_files(shards),
                **model.config_file(has_mtp, _declared(outputs, config)),
                **companions(directory),
            },
            tensors={_key(info): info for header in headers for info in header.tensors.values()},
            dropped=dropped,
            close=reader.close,
        )
    except BaseException:
        reader.close()
        raise


def open_ranks(directory: Path, reader: Reader) -> tuple[Header, ...]:
    """The headers of a complete set of rank files, in the order of the ranks."""
    if not directory.is_dir():
        raise InputError("not a directory", str(directory), "give the directory that holds the rank files")
    found = {entry.name: match for entry in directory.iterdir() if (match := _RANK_FILE.fullmatch(entry.name))}
    sizes = {int(match[2]) for match in found.values()}
    if len(sizes) != 1:
        what = "rank files of several sizes" if sizes else "no model{i}-mp{n}.safetensors"
        raise InputError(what, str(directory), "give the directory of one set of rank files")
    count = sizes.pop()
    names = [rank_file(rank, count) for rank in range(count)]
    if missing := [name for name in names if name not in found]:
        raise InputError(f"missing: {listed(missing)}", str(directory), "get the complete set of rank files")
    return tuple(reader.header(directory / name) for name in names)


def _present(ranks: _Ranks) -> list[Param]:
    """The parameters to look for: the MTP layers' only when some are there."""
    main, everything = list(parameters(ranks.spec, mtp=False)), list(parameters(ranks.spec))
    has_mtp = any(ranks.find(param.name) for param in everything if param.layer in ranks.spec.mtp_layers())
    return everything if has_mtp else main


def _outputs(ranks: _Ranks, options: Options) -> tuple[list[Output], dict[str, str]]:
    """Every stored tensor that is wanted, and the parts of those that are not."""
    mtp = ranks.spec.mtp_layers() if options.drop_mtp else range(0)
    outputs: list[Output] = []
    dropped: dict[str, str] = {}
    for param in _present(ranks):
        for output in _stored(ranks, param):
            if param.layer in mtp:
                dropped |= dict.fromkeys(output.sources, "drop-mtp")
            else:
                outputs.append(output)
    return outputs, dropped


def _stored(ranks: _Ranks, param: Param) -> Iterator[Output]:
    """A parameter's weight, and its multipliers when it is FP8."""
    found = ranks.find(param.name)
    if found is None:
        where = str(ranks.directory)
        raise InputError(f"no rank has {param.name}", where, "get the rank files that belong to this config.json")
    yield _merged(ranks, param.name, param.shape, found, _DTYPES)
    if found[1][0].dtype != "F8_E4M3":
        return
    name = f"{param.name}_scale_inv"
    scale = ranks.find(name)
    if scale is None:
        raise InputError(f"{param.name} is FP8 and has no scale", str(found[1][0].path), "get complete rank files")
    yield _merged(ranks, name, block_grid(param.shape, ranks.block), scale, _SCALES)


def _merged(
    ranks: _Ranks, name: str, shape: Shape, found: tuple[DemoTensor, list[TensorInfo]], dtypes: tuple[str, ...]
) -> Output:
    place, parts = found
    part_shape = list(shape)
    if place.dimension is not None:
        part_shape[place.dimension] //= len(parts)
    for part in parts:
        if list(part.shape) != part_shape or part.dtype not in dtypes or part.dtype != parts[0].dtype:
            what = f"{part.name} is {part.dtype} {list(part.shape)}, not {parts[0].dtype} {part_shape}"
            raise InputError(what, str(part.path), "get the rank files that belong to this config.json")
    make = {None: _same, 0: _stacked, 1: _beside}[place.dimension]
    row_bytes = parts[0].nbytes // max(1, parts[0].shape[0])
    sources = tuple(_key(part) for part in parts)
    work = row_bytes if place.dimension is None else 2 * row_bytes
    return Output(name, parts[0].dtype, shape, sources, partial(make, ranks.reader, parts), shape[0], work_bytes=work)


def _same(reader: MeteredReader, parts: list[TensorInfo], start: int, stop: int) -> NDArray:
    """A tensor that every rank has whole; the copies must agree."""
    first = reader.read_rows(parts[0], start, stop)
    for part in parts[1:]:
        if not np.array_equal(first.view(np.uint8), reader.read_rows(part, start, stop).view(np.uint8)):
            what = f"{part.name} differs from the copy in {parts[0].path.name}"
            raise InputError(what, str(part.path), "get rank files of one conversion")
    return first


def _stacked(reader: MeteredReader, parts: list[TensorInfo], start: int, stop: int) -> NDArray:
    height = parts[0].shape[0]
    taken = []
    for rank in range(start // height, -(-stop // height)):
        top = rank * height
        taken.append(reader.read_rows(parts[rank], max(start, top) - top, min(stop, top + height) - top))
    return np.concatenate(taken)


def _beside(reader: MeteredReader, parts: list[TensorInfo], start: int, stop: int) -> NDArray:
    return np.concatenate([reader.read_rows(part, start, stop) for part in parts], axis=1)


def _key(info: TensorInfo) -> str:
    return f"{info.path.name}:{info.name}"


def _extra(ranks: _Ranks, known: set[str], allows: Allowances) -> dict[str, str]:
    """Tensors that belong to no parameter; an error unless they are allowed to be dropped."""
    extra = [info for header in ranks.headers for info in header.tensors.values() if _key(info) not in known]
    if refused := [info for info in extra if not allows("drop", info.name)]:
        todo = f"give --allow 'drop={refused[0].name}' to leave it out"
        raise InputError(f"no parameter for: {listed([info.name for info in refused])}", str(refused[0].path), todo)
    return {_key(info): "drop" for info in extra}


def _declared(outputs: list[Output], config: Mapping[str, Any]) -> Any:
    """quantization_config of the merged checkpoint: the given one, or the usual one, when any weight is FP8."""
    if not any(output.dtype == "F8_E4M3" for output in outputs):
        return None
    return config.get("quantization_config") or fp8_config(())
