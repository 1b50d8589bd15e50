"""``mindspore-to-hf``: any of the MindSpore layouts as a Hugging Face directory of plain weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from ...models.params import Param
from ..allowances import Allowances
from ..layout_io import LayoutWeights
from ..plan import Output, Plan
from ..transposing import contiguous
from .huggingface import companions, index_files, new_shards
from .mindspore import MindSporeSource, open_mindspore
from .options import Options


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    source = open_mindspore(directory, options, allows)
    allows.check_used()
    params, dropped = kept_params(source, options)
    shards = new_shards((_output(source.weights, param) for param in params.values()), options.shard_bytes)
    has_mtp = source.has_mtp and not options.drop_mtp
    return Plan(
        kind="mindspore-to-hf",
        options={**options.chosen(), **source.model.named},
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={**index_files(shards), **source.model.config_file(has_mtp), **companions(directory)},
        tensors=source.checkpoint.tensors,
        dropped={**source.checkpoint.dropped, **dropped},
        close=source.checkpoint.close,
    )


def kept_params(source: MindSporeSource, options: Options) -> tuple[dict[str, Param], dict[str, str]]:
    """The parameters to convert, and the tensors that are dropped with the others."""
    mtp = source.model.spec.mtp_layers() if options.drop_mtp else range(0)
    kept = {name: param for name, param in source.params.items() if param.layer not in mtp}
    used = {tensor for name in kept for tensor in source.weights.sources(name)}
    others = (tensor for name in source.params if name not in kept for tensor in source.weights.sources(name))
    return kept, {tensor: "drop-mtp" for tensor in others if tensor not in used}


def _output(weights: LayoutWeights, param: Param) -> Output:
    rows, row_size = param.shape[0], param.size // param.shape[0]
    unit = weights.unit(param.name)
    return Output(
        name=param.name,
        dtype=param.dtype,
        shape=param.shape,
        sources=weights.sources(param.name),
        make=partial(_read, weights, param.name, "f32" if param.dtype == "F32" else "bf16"),
        rows=rows,
        unit=unit,
        work_bytes=2 * 2 * unit * row_size,  # as stored and turned
    )


def _read(weights: LayoutWeights, name: str, dtype: str, start: int, stop: int) -> NDArray:
    return contiguous(weights.read(name, dtype, (start, stop)))
