"""What the MindSpore kinds share: opening a converted directory, and writing one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import InputError
from ...models.layouts.mindspore import NAME_MAP_FILE
from ...models.layouts.placement import TargetTensor
from ...models.layouts.recognise import mindspore_targets, recognise
from ...models.params import Param, parameters
from ...models.spec import ModelSpec
from ..allowances import Allowances, AllowedCheckpoint
from ..checkpoint import listed
from ..golden_stick import GoldenStickReader
from ..inventory import main_table
from ..layout_io import LayoutWeights, TransposingReader, target_output
from ..meter import Meter
from ..plan import Output, ShardPlan, SourceFiles, plan_shard
from ..strict_json import read_object
from .options import Options
from .source import Model, source_model

METADATA = {"format": "ms"}
_DTYPES = {"BF16": ("BF16", "F32", "F16"), "F32": ("F32", "BF16", "F16")}  # the layout's: what may stand in its place


@dataclass(frozen=True, eq=False)
class MindSporeSource:
    """An opened MindSpore directory in one of the layouts of `models.layouts.recognise`.

    Golden-stick's W8A8 modules are seen as the FP32 weights that they mean.
    """

    checkpoint: AllowedCheckpoint
    layout: str
    model: Model
    weights: LayoutWeights
    params: Mapping[str, Param]
    has_mtp: bool
    files: SourceFiles
    meter: Meter
    reader: GoldenStickReader


def open_mindspore(directory: Path, options: Options, allows: Allowances) -> MindSporeSource:
    """Raises InputError for anything that headers can show to be wrong; no tensor data is read."""
    model = source_model(directory, options)
    spec = model.spec
    meter = Meter()
    reader = GoldenStickReader(meter)
    checkpoint = AllowedCheckpoint.open(directory, reader)
    try:
        checkpoint.make_exceptions(allows, (1, 1))
        checkpoint.tensors = reader.plain(checkpoint.tensors)
        layout = recognise(checkpoint.headers.keys(), checkpoint.tensors.keys())
        if layout is None or not layout.startswith("mindspore_"):
            what = f"not a MindSpore layout of DeepSeek-V3, but {layout or 'unknown'}"
            raise InputError(what, str(directory), "see deepspan inspect")
        _check_name_map(directory, checkpoint.headers)
        targets, has_mtp = _targets(layout, spec, checkpoint)
        _check_tensors(targets, checkpoint, allows)
        table = {param.name: param for param in parameters(spec, mtp=has_mtp)}
        shared = _left_out(targets, table, spec)
        weights = LayoutWeights(reader, reader.exact(checkpoint.tensors), targets, table, shared)
        files = SourceFiles(directory, checkpoint.headers, model.path)
        return MindSporeSource(checkpoint, layout, model, weights, table, has_mtp, files, meter, reader)
    except BaseException:
        checkpoint.close()
        raise


def _check_name_map(directory: Path, headers: Mapping[str, Any]) -> None:
    """param_name_map.json, flat or under ``weight_map``, must agree with the headers; one file needs none."""
    path = directory / NAME_MAP_FILE
    if not path.is_file():
        if len(headers) == 1:
            return
        raise InputError(f"no {NAME_MAP_FILE}", str(directory), "finish the conversion that wrote the directory")
    content = read_object(path)
    listed_places = content.get("weight_map", content)
    places = {name: file for file, header in headers.items() for name in header.tensors}
    if listed_places != places:
        wrong = sorted(name for name in {**listed_places, **places} if listed_places.get(name) != places.get(name))
        raise InputError(f"the map disagrees with the files on {listed(wrong)}", str(path), "convert again")


def _targets(layout: str, spec: ModelSpec, checkpoint: AllowedCheckpoint) -> tuple[list[TargetTensor], bool]:
    """The layout's tensors, with the MTP layers when any tensor is theirs."""
    names = checkpoint.tensors.keys()
    everything = list(mindspore_targets(layout, spec, True, names))
    main = {target.name for target in mindspore_targets(layout, spec, False, names)}
    has_mtp = any(target.name in names and target.name not in main for target in everything)
    wanted = [target for target in everything if has_mtp or target.name in main]
    where = str(checkpoint.directory)
    if missing := [target.name for target in wanted if target.name not in names]:
        raise InputError(f"missing: {listed(missing)}", where, "get the complete checkpoint of this config.json")
    known = {target.name for target in wanted}
    if extra := [name for name in names if name not in known]:
        todo = f"give --allow 'drop={extra[0]}' to leave it out, or the config.json that belongs to the checkpoint"
        raise InputError(f"no parameter for: {listed(extra)}", where, todo)
    return wanted, has_mtp


def _check_tensors(targets: Iterable[TargetTensor], checkpoint: AllowedCheckpoint, allows: Allowances) -> None:
    for target in targets:
        info = checkpoint.tensors[target.name]
        if info.shape != target.shape:
            what = f"{target.name} is {list(info.shape)}, not {list(target.shape)}"
            raise InputError(what, str(info.path), "get the config.json that belongs to the checkpoint")
        if info.dtype not in _DTYPES[target.dtype]:
            what = f"{target.name} is {info.dtype}, not {target.dtype}"
            raise InputError(what, str(info.path), "give a checkpoint that is not quantised")
        if target.dtype == "BF16" and info.dtype != "BF16" and not allows("round", target.name):
            todo = f"give --allow 'round={target.name}' to round it"
            raise InputError(f"{target.name} is {info.dtype}, not BF16", str(info.path), todo)


def _left_out(targets: Iterable[TargetTensor], table: Mapping[str, Param], spec: ModelSpec) -> dict[str, str]:
    """Parameters that the layout does not store: the MTP layers' tables, which are copies of the main ones."""
    placed = {placement.source for target in targets for placement in target.placements}
    return {name: main for name in table if name not in placed and (main := main_table(table[name], spec)) is not None}


def mindspore_outputs(
    targets: Iterable[TargetTensor],
    weights: TransposingReader,
    params: Mapping[str, Param],
    sources: Callable[[str], Iterable[str]],
) -> dict[str, list[Output]]:
    """How each target is made, by file; ``sources`` tells which stored tensors hold a canonical parameter."""
    shapes = {name: param.shape for name, param in params.items()}
    files: dict[str, list[Output]] = {}
    for target in targets:
        names = {name for placement in target.placements for name in sources(placement.source)}
        files.setdefault(target.file, []).append(target_output(target, weights, shapes, sorted(names)))
    return files


def mindspore_shards(files: Mapping[str, Sequence[Output]]) -> tuple[ShardPlan, ...]:
    return tuple(plan_shard(name, outputs, METADATA) for name, outputs in files.items())


def name_map(shards: Sequence[ShardPlan], indent: int) -> dict[str, bytes]:
    """The flat map from parameters to files that MindSpore's loader wants."""
    places = {output.name: shard.name for shard in shards for output in shard.outputs}
    return {NAME_MAP_FILE: json.dumps(places, indent=indent, ensure_ascii=False).encode()}
